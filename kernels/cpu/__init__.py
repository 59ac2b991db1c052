"""The fused operations on oneDNN and C++."""
