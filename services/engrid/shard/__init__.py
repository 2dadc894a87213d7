"""One memory shard: partitions of Engram tables in flat arrays, served and updated over gRPC."""
