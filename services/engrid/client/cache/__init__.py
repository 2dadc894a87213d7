"""Rows of sealed tables kept by key."""
