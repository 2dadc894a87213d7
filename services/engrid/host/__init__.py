"""The machine under a process: memory, mappings, descriptors handed over, the allocator."""
