"""A shard on the wire: the server, its calls and its lookup streams."""
