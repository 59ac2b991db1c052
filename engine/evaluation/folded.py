"""A supernet's operations in the form that evaluation runs: weights sliced, batch normalisation folded in.

`FoldedLayers` score with the running statistics that training left in the supernet: one set of folded weights per
operation, whatever the node. `RecalibratedLayers` (engine/evaluation/recalibration.py) have statistics of each node.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bsnas.engine.evaluation.tree import PrefixTree, Step
from bsnas.engine.networks.supernet import Supernet
from bsnas.kernels import BlockShape, BlockWeights
from bsnas.kernels.inference import fold_norm, folded_depthwise, folded_pointwise, packed_depthwise


class FoldedConv(NamedTuple):
    """Weight [out, in] (pointwise) or [C, 1, k, k] (depthwise) with its batch normalisation folded in; bias [out]."""

    weight: Tensor
    bias: Tensor


class FoldedBlock(NamedTuple):
    """An inverted residual block without batch normalisation; `expand` is None where there is no expansion."""

    expand: FoldedConv | None
    depthwise: FoldedConv
    project: FoldedConv
    stride: int
    residual: bool

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        y = x if self.expand is None else folded_pointwise(x, *self.expand, relu6=True)
        y = folded_depthwise(y, *self.depthwise, stride=self.stride, relu6=True)
        return folded_pointwise(y, *self.project, relu6=False, residual=x if self.residual else None)


def sliced_weights(weights: BlockWeights, shape: BlockShape) -> BlockWeights:
    """The part of shared weights that one operation uses: expand [hidden, in], depthwise [hidden, 1, k, k], project
    [out, hidden]; views."""
    margin = (weights.depthwise.shape[-1] - shape.kernel) // 2
    centre = slice(margin, margin + shape.kernel)
    return BlockWeights(
        None if weights.expand is None else weights.expand[: shape.hidden, : shape.in_channels],
        weights.depthwise[: shape.hidden, :, centre, centre],
        weights.project[: shape.out_channels, : shape.hidden],
    )


Affine = tuple[Tensor, Tensor]
"""Scale and shift [C], float32."""


def fold(weight: Tensor, affine: Affine, dtype: torch.dtype) -> FoldedConv:
    """A convolution followed by scale and shift as one; in float32, then cast."""
    scale, shift = affine
    weight = weight.detach().float() * scale.view(-1, *[1] * (weight.dim() - 1))
    return FoldedConv(weight.to(dtype).contiguous(), shift.to(dtype))


def fold_block(
    weights: BlockWeights, norms: Sequence[Affine], shape: BlockShape, size: int, dtype: torch.dtype
) -> FoldedBlock:
    """The block of sliced weights, packed for inputs of `size` x `size` pixels; norms as many as weights."""
    given = [weight for weight in weights if weight is not None]
    *expand, depthwise, project = (fold(weight, norm, dtype) for weight, norm in zip(given, norms, strict=True))
    return FoldedBlock(
        expand[0] if expand else None,
        depthwise._replace(weight=packed_depthwise(depthwise.weight, size, shape.stride)),
        project,
        shape.stride,
        shape.residual,
    )


class Stem:
    """The stem's convolution and separable block, which all architectures share.

    `norms` are the (scale, shift) after the convolution, the depthwise and the pointwise convolution.
    """

    def __init__(self, supernet: Supernet, norms: Sequence[Affine], resolution: int, dtype: torch.dtype) -> None:
        shape = supernet.separable_shape
        weights = sliced_weights(supernet.separable_weights, shape)
        self.stride = supernet.space.stem_stride
        weight, self.bias = fold(supernet.stem_conv.weight, norms[0], dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.separable = fold_block(weights, norms[1:], shape, -(-resolution // self.stride), dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> the input of the first block."""
        x = F.conv2d(images, self.weight, self.bias, stride=self.stride, padding=1)
        return self.separable(x.clamp_(0, 6))


class Classifier:
    """Average pool and linear layer."""

    def __init__(self, supernet: Supernet, dtype: torch.dtype) -> None:
        self.weight = supernet.classifier.weight.detach().to(dtype)
        self.bias = supernet.classifier.bias.detach().to(dtype)

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, tail_channels, H, W] -> logits [N, classes]."""
        return F.linear(features.mean((2, 3)), self.weight, self.bias)


class FoldedLayers:
    """The layers of a supernet with its running statistics, each that a tree needs folded once."""

    whole_batches = False

    def __init__(self, supernet: Supernet, resolution: int, dtype: torch.dtype) -> None:
        self.supernet = supernet
        self.dtype = dtype
        stem_norms = (supernet.stem_bn, *supernet.separable_norms[1:])
        self.stem = Stem(supernet, [fold_norm(norm) for norm in stem_norms], resolution, dtype)
        self.classify = Classifier(supernet, dtype)
        self._blocks: dict[tuple[int, Step], FoldedBlock] = {}
        self._tails: dict[int, FoldedConv] = {}

    def prepare(self, tree: PrefixTree) -> None:
        """Fold what the tree needs and no earlier one did."""
        for i, level in enumerate(tree.levels):
            for step in level.step_counts():
                if (i, step) not in self._blocks:
                    shape = BlockShape(*step.dims)
                    weights = sliced_weights(self.supernet.block_weights(i, step.operation), shape)
                    norms = [fold_norm(norm) for norm in self.supernet.block_norms(i, step.operation)]
                    self._blocks[i, step] = fold_block(weights, norms, shape, level.in_size, self.dtype)
        for width in tree.final_widths().keys() - self._tails.keys():
            norm = fold_norm(self.supernet.tail_norm(width))
            self._tails[width] = fold(self.supernet.tail_weight[:, :width], norm, self.dtype)

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        return self._blocks[level, step](x)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """The leaves' outputs x [leaves * n, width, H, W] -> logits [leaves * n, classes]."""
        return self.classify(folded_pointwise(x, *self._tails[width], relu6=True))
