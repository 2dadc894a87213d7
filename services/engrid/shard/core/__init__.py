"""What a shard decides, without any I/O."""
