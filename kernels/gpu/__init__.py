"""The fused operations in Triton, for NVIDIA GPUs."""
