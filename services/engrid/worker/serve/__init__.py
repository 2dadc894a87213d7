"""Models loaded and generated with."""
