"""What makes a shard's state survive: records, bases, and the folder they lie in."""
