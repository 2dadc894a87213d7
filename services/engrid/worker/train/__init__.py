"""A training run of one worker, from the text to the checkpoint."""
