"""The run directory: its paths, its facts, its commands."""
