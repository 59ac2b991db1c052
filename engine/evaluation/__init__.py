"""Thousands of subnets scored at once."""
