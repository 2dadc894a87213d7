"""What is kept on disk and read by shards, workers and the command line alike: the disk itself, and checkpoints.

disk.py        the operations, and what each makes durable
partition.py   one partition's rows and optimizer state as safetensors files: written as a stream, read by row range
manifest.py    what a checkpoint says of itself
checkpoint.py  the folder of checkpoints: published by one rename, listed, verified, restored from, removed
"""
