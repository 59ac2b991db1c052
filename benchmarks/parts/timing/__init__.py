"""Timing in turns, latency of networks by backend, and where a figure comes from."""
