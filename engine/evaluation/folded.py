"""A supernet's blocks in the form that evaluation runs: weights sliced, batch normalisation folded in.

`FoldedLayers` score with the running statistics that training left in the supernet: one set of folded weights per
operation, whatever the node. `RecalibratedLayers` (engine/evaluation/recalibration.py) have statistics of each node.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bsnas.engine.evaluation.tree import PrefixTree, Step
from bsnas.engine.networks.supernet import Supernet, classify
from bsnas.engine.space.plan import Plan, layer_sizes, size_after
from bsnas.kernels import Block
from bsnas.kernels.inference import fold_norm, folded, packed_depthwise
from bsnas.kernels.plan import LayerPlan, run, slice_of

Affine = tuple[Tensor, Tensor]
"""Scale and shift [C], float32."""


class FoldedConv(NamedTuple):
    """A weight with its batch normalisation folded in, as `slice_of` gives it; bias [out]."""

    weight: Tensor
    bias: Tensor


class FoldedBlock(NamedTuple):
    """A block without batch normalisation."""

    plan: Plan
    convs: tuple[FoldedConv, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, inputs, H, W] -> [N, outputs, H', W']."""

        def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
            return folded(each, y, *self.convs[index], residual)

        return run(self.plan, x, layer)


def sliced_weights(block: Block) -> list[Tensor]:
    """The part of a block's weights that each of its convolutions uses; views."""
    return [slice_of(block.weights[layer.name], layer) for layer in plan_of(block).convs]


def plan_of(block: Block) -> Plan:
    assert isinstance(block.plan, Plan)
    return block.plan


def fold(weight: Tensor, affine: Affine, dtype: torch.dtype) -> FoldedConv:
    """A convolution followed by scale and shift as one; in float32, then cast."""
    scale, shift = affine
    weight = weight.detach().float() * scale.view(-1, *[1] * (weight.dim() - 1))
    return FoldedConv(weight.to(dtype).contiguous(), shift.to(dtype))


def fold_block(block: Block, affines: Sequence[Affine], size: int, dtype: torch.dtype) -> FoldedBlock:
    """The block with a scale and shift for each of its convolutions, packed for inputs of `size` x `size` pixels."""
    convs = []
    sizes = layer_sizes(plan_of(block), size)
    for weight, affine, (layer, read, _) in zip(sliced_weights(block), affines, sizes, strict=True):
        conv = fold(weight, affine, dtype)
        if layer.depthwise:
            conv = conv._replace(weight=packed_depthwise(conv.weight, read, layer.stride))
        elif weight.dim() == 4:
            conv = conv._replace(weight=conv.weight.contiguous(memory_format=torch.channels_last))
        convs.append(conv)
    return FoldedBlock(plan_of(block), tuple(convs))


class Chain:
    """Blocks without a choice one after another, as the stem's.

    `affines` are, per block, the scale and shift of each of its convolutions; `size` is what the first block reads.
    """

    def __init__(
        self, blocks: Sequence[Block], affines: Iterable[Sequence[Affine]], size: int, dtype: torch.dtype
    ) -> None:
        self._blocks = []
        for block, each in zip(blocks, affines, strict=True):
            self._blocks.append(fold_block(block, each, size, dtype))
            size = size_after(size, plan_of(block).stride)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, inputs, H, W] -> [N, outputs, H', W']."""
        for block in self._blocks:
            x = block(x)
        return x


class Classifier:
    """Average pool and linear layer."""

    def __init__(self, supernet: Supernet, dtype: torch.dtype) -> None:
        self.weight = supernet.classifier.weight.detach().to(dtype)
        self.bias = supernet.classifier.bias.detach().to(dtype)

    def __call__(self, features: Tensor) -> Tensor:
        """Features [N, C, H, W] -> logits [N, classes]."""
        return classify(features, self.weight, self.bias)


class FoldedLayers:
    """The layers of a supernet with its running statistics, each that a tree needs folded once."""

    whole_batches = False

    def __init__(self, supernet: Supernet, resolution: int, dtype: torch.dtype) -> None:
        self.supernet = supernet
        self.dtype = dtype
        self.stem = Chain(supernet.stem_blocks, map(_running, supernet.stem_blocks), resolution, dtype)
        self.classify = Classifier(supernet, dtype)
        self._blocks: dict[tuple[int, Step], FoldedBlock] = {}
        self._tails: dict[int, Chain] = {}

    def prepare(self, tree: PrefixTree) -> None:
        """Fold what the tree needs and no earlier one did."""
        for i, level in enumerate(tree.levels):
            for step in level.step_counts():
                if (i, step) not in self._blocks:
                    block = self.supernet.block(i, step.operation, step.inputs)
                    self._blocks[i, step] = fold_block(block, _running(block), level.in_size, self.dtype)
        for width in tree.final_widths().keys() - self._tails.keys():
            blocks = self.supernet.tail_blocks(width)
            self._tails[width] = Chain(blocks, map(_running, blocks), tree.levels[-1].out_size, self.dtype)

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        return self._blocks[level, step](x)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """The leaves' outputs x [leaves * n, width, H, W] -> logits [leaves * n, classes]."""
        return self.classify(self._tails[width](x))


def _running(block: Block) -> list[Affine]:
    """The scale and shift of each of its convolutions, by the statistics that training left."""
    return [fold_norm(norm) for norm in block.norms]
