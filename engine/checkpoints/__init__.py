"""What a run needs to continue, written and read."""
