"""A running cluster: Ray places, starts and stops its processes; commands reach them over gRPC."""
