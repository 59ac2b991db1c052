"""Latency of any network from measured parts."""
