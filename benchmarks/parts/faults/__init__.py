"""Runs that are stopped and files that are damaged, for soak.py."""
