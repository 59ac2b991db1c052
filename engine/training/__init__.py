"""Supernet and network trained."""
