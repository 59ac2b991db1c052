"""The networks that the benchmarks of kernels count and time."""
