"""Readers of data sets as their owners keep them: each gives samples in a fixed order."""
