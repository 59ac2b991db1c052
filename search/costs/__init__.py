"""Costs of networks and the limits on them."""
