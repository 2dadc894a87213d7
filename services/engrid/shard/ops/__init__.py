"""What a shard does for a request beyond a lookup: each takes the service."""
