"""Compiling kernels, and what their launches cost, without a GPU."""
