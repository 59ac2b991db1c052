"""Photographs, and the loaders of this and other projects that are timed on them."""
