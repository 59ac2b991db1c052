"""Evolution, NSGA-II and what they draw with."""
