"""Fused operations of the supernet's blocks, each with a plain torch reference and faster backends."""

from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.dispatch import choose_backend, inverted_residual, pointwise_bn_relu6, set_backend

__all__ = [
    "BlockShape", "BlockWeights", "choose_backend", "inverted_residual", "pointwise_bn_relu6", "set_backend",
]  # fmt: skip
