"""Fused operations of the supernet's blocks, each with a plain torch reference and faster backends."""

from bsnas.kernels.backends import choose_backend, set_backend
from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.training import Block, inverted_residual, pointwise_bn_act, run_blocks

__all__ = [
    "Block", "BlockShape", "BlockWeights", "choose_backend", "inverted_residual", "pointwise_bn_act", "run_blocks",
    "set_backend",
]  # fmt: skip
