"""The demo: the main job from start to end, and what it measured."""
