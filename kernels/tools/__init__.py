"""Launches recorded instead of made, kernels compiled ahead of them, a driver that launches nothing."""
