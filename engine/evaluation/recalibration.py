"""Batch normalisation statistics of every subnet, computed along the prefix tree.

Recalibrating a subnet alone means: reset its statistics, set `momentum=None` (the average over batches), and run the
recalibration images through it batch by batch in train mode, as SPOS and OFA do. Every batch is normalised with its own
statistics, and the averages over batches are what scoring uses. So a layer's statistics depend on the operations up
to that layer only, and one pass over the tree computes them for all subnets, each distinct prefix once.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.engine.evaluation.folded import Affine, Classifier, Stem, sliced_weights
from bsnas.engine.evaluation.images import ScoredImages
from bsnas.engine.evaluation.memory import Budget, Memory
from bsnas.engine.evaluation.tree import PrefixTree, Step
from bsnas.engine.evaluation.walk import Walker
from bsnas.engine.evaluation.workers import RunAll
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.preemption import stop_here
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.space import BlockDims
from bsnas.kernels import BlockShape, BlockWeights
from bsnas.kernels.inference import (
    folded_depthwise,
    folded_pointwise,
    scale_and_shift,
    segment_affine_,
    segment_statistics,
    segmented_depthwise,
    segmented_pointwise,
)

Norms = tuple[nn.BatchNorm2d | None, ...]


@dataclass
class Moments:
    """Sums over batches of the mean and the unbiased variance of S nodes, [S, C] in float64.

    Float64 sums of a few float32 numbers are exact, so the order of batches, and which rank had them, changes nothing.
    """

    mean: Tensor
    var: Tensor

    @classmethod
    def zeros(cls, nodes: int, norm: nn.BatchNorm2d) -> "Moments":
        shape = (nodes, norm.num_features)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=norm.weight.device) for _ in range(2)))


@dataclass
class TreeStatistics:
    """The statistics of all nodes of a tree: per batch normalisation layer the moments of the nodes that use it."""

    batches: int
    """How many batches all ranks together add up."""
    stem: list[Moments] = field(default_factory=list)
    """After the stem's convolution, the separable block's depthwise and its pointwise convolution."""
    blocks: dict[tuple[int, Step], list[Moments]] = field(default_factory=dict)
    """Per level and step, after expand, depthwise and project; a row per node of that step."""
    tails: dict[int, Moments] = field(default_factory=dict)
    """Per width, a row per leaf of that width."""

    @classmethod
    def zeros(cls, supernet: Supernet, tree: PrefixTree, batches: int) -> "TreeStatistics":
        statistics = cls(batches)
        stem_norms = (supernet.stem_bn, *supernet.separable_norms[1:])
        statistics.stem = [Moments.zeros(1, norm) for norm in stem_norms]
        for i, level in enumerate(tree.levels):
            for step, nodes in level.step_counts().items():
                norms = supernet.block_norms(i, step.operation)
                statistics.blocks[i, step] = [Moments.zeros(nodes, norm) for norm in norms]
        for width, leaves in tree.final_widths().items():
            statistics.tails[width] = Moments.zeros(leaves, supernet.tail_norm(width))
        return statistics

    def tensors(self) -> list[Tensor]:
        """All sums, in an order that is the same on every rank."""
        moments = [*self.stem, *(m for ms in self.blocks.values() for m in ms), *self.tails.values()]
        return [tensor for m in moments for tensor in (m.mean, m.var)]


def statistics_bytes(dims: Sequence[BlockDims], tail_channels: int) -> int:
    """Bytes of the moments, and of the scales and shifts made of them, of one architecture that shares nothing."""
    channels = sum(2 * block.hidden + block.out_channels for block in dims) + tail_channels
    return channels * 2 * (8 + 4)


class StatisticsLayers:
    """The layers of a supernet in train mode, adding the statistics of every node to `statistics`; thread-safe."""

    whole_batches = True

    def __init__(self, supernet: Supernet, statistics: TreeStatistics, dtype: torch.dtype) -> None:
        self.supernet = supernet
        self.statistics = statistics
        self.dtype = dtype
        self._adding = threading.Lock()

    def stem(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> the input of the first block."""
        supernet, (first, *separable) = self.supernet, self.statistics.stem
        weight = supernet.stem_conv.weight.detach().to(self.dtype)
        x = F.conv2d(images, weight, stride=supernet.space.stem_stride, padding=1)
        x = self._normalize(x, supernet.stem_bn, first, range(1), relu6=True)
        weights = sliced_weights(supernet.separable_weights, supernet.separable_shape)
        norms = supernet.separable_norms
        return self._depthwise_project(x, x, weights, norms, supernet.separable_shape, separable, range(1))

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        shape = BlockShape(*step.dims)
        weights = sliced_weights(self.supernet.block_weights(level, step.operation), shape)
        norms = self.supernet.block_norms(level, step.operation)
        expand, *others = self.statistics.blocks[level, step]
        assert weights.expand is not None
        y = self._pointwise(x, weights.expand)
        y = self._normalize(y, norms[0], expand, nodes, relu6=True)
        return self._depthwise_project(x, y, weights, norms, shape, others, nodes)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """Statistics after the tail's convolution; no logits are needed: returns [leaves * n, 0]."""
        y = self._pointwise(x, self.supernet.tail_weight[:, :width])
        self._normalize(y, self.supernet.tail_norm(width), self.statistics.tails[width], leaves, relu6=True)
        return x.new_empty(len(x), 0)

    def _depthwise_project(
        self,
        x: Tensor,
        hidden: Tensor,
        weights: BlockWeights,
        norms: Norms,
        shape: BlockShape,
        moments: Sequence[Moments],
        nodes: range,
    ) -> Tensor:
        bias = hidden.new_zeros(shape.hidden)
        y = folded_depthwise(hidden, self._cast(weights.depthwise), bias, stride=shape.stride, relu6=False)
        y = self._normalize(y, norms[1], moments[0], nodes, relu6=True)
        y = self._pointwise(y, weights.project)
        return self._normalize(y, norms[2], moments[1], nodes, relu6=False, residual=x if shape.residual else None)

    def _pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        return folded_pointwise(x, self._cast(weight), x.new_zeros(len(weight)), relu6=False)

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype).contiguous()

    def _normalize(
        self,
        y: Tensor,
        norm: nn.BatchNorm2d | None,
        moments: Moments,
        nodes: range,
        *,
        relu6: bool,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Add the statistics of y [nodes * n, C, H, W] to those nodes' rows and normalise with them."""
        assert norm is not None
        mean, var = segment_statistics(y, len(nodes))
        values = y.numel() // (len(nodes) * y.shape[1])
        rows = slice(nodes.start, nodes.stop)
        with self._adding:
            moments.mean[rows] += mean.double()
            moments.var[rows] += (var * (values / (values - 1))).double()
        return segment_affine_(y, *scale_and_shift(norm, mean, var), relu6=relu6, residual=residual)


RECALIBRATION_BATCH = 128
"""Images per batch of recalibration; a smaller set is one batch."""


def recalibration_batch(images: int) -> int:
    """Images per batch when so many are there; those that fill no batch are left out."""
    return min(RECALIBRATION_BATCH, images)


def recalibrated_statistics(
    supernet: Supernet,
    tree: PrefixTree,
    images: ScoredImages,
    budget: Budget,
    dtype: torch.dtype,
    process: Process,
    run_all: RunAll,
) -> TreeStatistics:
    """The statistics of every node, equal on all ranks, which share the batches out.

    Raises `UserError` when a batch does not fit in memory, however few nodes are held at once.
    """
    size = recalibration_batch(len(images))
    batches = len(images) // size

    def add_all(memory: Memory, halvings: int) -> TreeStatistics:
        statistics = TreeStatistics.zeros(supernet, tree, batches)
        layers = StatisticsLayers(supernet, statistics, dtype)
        walker = Walker(tree, layers)

        def add_batch(batch: int) -> None:
            for _ in walker.walk(images.normalized(batch * size, (batch + 1) * size, dtype), memory):
                if process.world_size == 1:
                    stop_here()

        run_all(add_batch, range(process.rank, batches, process.world_size))
        return statistics

    statistics = budget.fit(
        add_all,
        f"a batch of {size} images does not fit in the memory of {process.device}; "
        "end other programs there, or score with bn running",
    )
    if process.world_size > 1:
        for tensor in statistics.tensors():
            torch.distributed.all_reduce(tensor)
    return statistics


class RecalibratedLayers:
    """The layers of a supernet with statistics of each node: shared weights, scale and shift of its own."""

    whole_batches = False

    def __init__(self, supernet: Supernet, tree: PrefixTree, statistics: TreeStatistics, dtype: torch.dtype) -> None:
        self._statistics = statistics
        stem_norms = (supernet.stem_bn, *supernet.separable_norms[1:])
        stem = [self._affine(*pair) for pair in zip(stem_norms, statistics.stem, strict=True)]
        self.stem = Stem(supernet, [(scale[0], shift[0]) for scale, shift in stem], tree.resolution, dtype)
        self.classify = Classifier(supernet, dtype)
        self._blocks: list[dict[Step, SegmentedBlock]] = []
        for i, level in enumerate(tree.levels):
            blocks = {}
            for step in level.step_counts():
                shape = BlockShape(*step.dims)
                weights = sliced_weights(supernet.block_weights(i, step.operation), shape)
                norms = supernet.block_norms(i, step.operation)
                affine = [self._affine(*pair) for pair in zip(norms, statistics.blocks[i, step], strict=True)]
                blocks[step] = SegmentedBlock(weights, affine, shape, dtype)
            self._blocks.append(blocks)
        self._tail_weight = supernet.tail_weight.detach().to(dtype)
        self._tails = {
            width: self._affine(supernet.tail_norm(width), statistics.tails[width]) for width in tree.final_widths()
        }

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        return self._blocks[level][step](x, nodes)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """The leaves' outputs x [leaves * n, width, H, W] -> logits [leaves * n, classes]."""
        scale, shift = self._tails[width]
        rows = slice(leaves.start, leaves.stop)
        weight = self._tail_weight[:, :width]
        return self.classify(segmented_pointwise(x, weight, scale[rows], shift[rows], relu6=True))

    def _affine(self, norm: nn.BatchNorm2d, sums: Moments) -> Affine:
        batches = self._statistics.batches
        return scale_and_shift(norm, sums.mean / batches, sums.var / batches)


class SegmentedBlock:
    """An inverted residual block with weights that its nodes share and a scale and shift of each node."""

    def __init__(
        self,
        weights: BlockWeights,
        affine: Sequence[Affine],
        shape: BlockShape,
        dtype: torch.dtype,
    ) -> None:
        self.expand, self.depthwise, self.project = (
            weight.detach().to(dtype).contiguous() for weight in weights if weight is not None
        )
        self.affine = affine
        self.shape = shape

    def __call__(self, x: Tensor, nodes: range) -> Tensor:
        """x [nodes * n, in, H, W] -> [nodes * n, out, ceil(H / stride), ceil(W / stride)]."""
        rows = slice(nodes.start, nodes.stop)
        (a1, b1), (a2, b2), (a3, b3) = self.affine
        y = segmented_pointwise(x, self.expand, a1[rows], b1[rows], relu6=True)
        y = segmented_depthwise(y, self.depthwise, a2[rows], b2[rows], stride=self.shape.stride, relu6=True)
        shortcut = x if self.shape.residual else None
        return segmented_pointwise(y, self.project, a3[rows], b3[rows], relu6=False, residual=shortcut)
