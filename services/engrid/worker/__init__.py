"""A compute worker: the dense model, training and generation, with rows from the memory shards."""
