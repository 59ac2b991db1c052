"""Searches of a run: their history, their finalists."""
