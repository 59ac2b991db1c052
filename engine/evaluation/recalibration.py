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

from bsnas.engine.evaluation.folded import Affine, Chain, Classifier, plan_of, sliced_weights
from bsnas.engine.evaluation.images import ScoredImages
from bsnas.engine.evaluation.memory import Budget, Memory
from bsnas.engine.evaluation.tree import PrefixTree, Step
from bsnas.engine.evaluation.walk import Walker
from bsnas.engine.evaluation.workers import RunAll
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.preemption import stop_here
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.plan import Plan
from bsnas.kernels import Block
from bsnas.kernels.inference import (
    convolution,
    scale_and_shift,
    segment_affine_,
    segment_statistics,
    segmented,
)
from bsnas.kernels.plan import LayerPlan, run


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
    """The statistics of all nodes of a tree: per block the moments of the nodes that use each of its norms."""

    batches: int
    """How many batches all ranks together add up."""
    stem: list[list[Moments]] = field(default_factory=list)
    """Per block of the stem; one row each."""
    blocks: dict[tuple[int, Step], list[Moments]] = field(default_factory=dict)
    """Per level and step; a row per node of that step."""
    tails: dict[int, list[list[Moments]]] = field(default_factory=dict)
    """Per width, for each block of the tail; a row per leaf of that width."""

    @classmethod
    def zeros(cls, supernet: Supernet, tree: PrefixTree, batches: int) -> "TreeStatistics":
        def of(block: Block, nodes: int) -> list[Moments]:
            return [Moments.zeros(nodes, norm) for norm in block.norms]

        statistics = cls(batches)
        statistics.stem = [of(block, 1) for block in supernet.stem_blocks]
        for i, level in enumerate(tree.levels):
            for step, nodes in level.step_counts().items():
                statistics.blocks[i, step] = of(supernet.block(i, step.operation, step.inputs), nodes)
        for width, leaves in tree.final_widths().items():
            statistics.tails[width] = [of(block, leaves) for block in supernet.tail_blocks(width)]
        return statistics

    def tensors(self) -> list[Tensor]:
        """All sums, in an order that is the same on every rank."""
        chains = [*self.stem, *self.blocks.values(), *(ms for chain in self.tails.values() for ms in chain)]
        return [tensor for moments in chains for m in moments for tensor in (m.mean, m.var)]


def statistics_bytes(plans: Sequence[Plan]) -> int:
    """Bytes of the moments, and of the scales and shifts made of them, of one architecture that shares nothing."""
    return sum(layer.outputs for plan in plans for layer in plan.convs) * 2 * (8 + 4)


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
        x = images
        for block, moments in zip(self.supernet.stem_blocks, self.statistics.stem, strict=True):
            x = self._run(block, moments, range(1), x)
        return x

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        block = self.supernet.block(level, step.operation, step.inputs)
        return self._run(block, self.statistics.blocks[level, step], nodes, x)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """Statistics of the tail's layers; no logits are needed: returns [leaves * n, 0]."""
        for block, moments in zip(self.supernet.tail_blocks(width), self.statistics.tails[width], strict=True):
            x = self._run(block, moments, leaves, x)
        return x.new_empty(len(x), 0)

    def _run(self, block: Block, moments: Sequence[Moments], nodes: range, x: Tensor) -> Tensor:
        weights = [weight.detach().to(self.dtype).contiguous() for weight in sliced_weights(block)]

        def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
            y = convolution(each, y, weights[index])
            scale, shift = self._statistics_of(y, block.norms[index], moments[index], nodes)
            return segment_affine_(y, scale, shift, activation=each.activation, residual=residual)

        return run(block.plan, x, layer)

    def _statistics_of(self, y: Tensor, norm: nn.BatchNorm2d, moments: Moments, nodes: range) -> Affine:
        """Add the statistics of y [nodes * n, C, H, W] to those nodes' rows; the scale and shift that they make."""
        mean, var = segment_statistics(y, len(nodes))
        values = y.numel() // (len(nodes) * y.shape[1])
        rows = slice(nodes.start, nodes.stop)
        with self._adding:
            moments.mean[rows] += mean.double()
            moments.var[rows] += (var * (values / (values - 1))).double()
        return scale_and_shift(norm, mean, var)


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
        stem = [
            [(scale[0], shift[0]) for scale, shift in self._affines(block, moments)]
            for block, moments in zip(supernet.stem_blocks, statistics.stem, strict=True)
        ]
        self.stem = Chain(supernet.stem_blocks, stem, tree.resolution, dtype)
        self.classify = Classifier(supernet, dtype)
        self._blocks: list[dict[Step, SegmentedBlock]] = []
        for i, level in enumerate(tree.levels):
            blocks = {}
            for step in level.step_counts():
                block = supernet.block(i, step.operation, step.inputs)
                blocks[step] = SegmentedBlock(block, self._affines(block, statistics.blocks[i, step]), dtype)
            self._blocks.append(blocks)
        self._tails = {
            width: [
                SegmentedBlock(block, self._affines(block, moments), dtype)
                for block, moments in zip(supernet.tail_blocks(width), statistics.tails[width], strict=True)
            ]
            for width in tree.final_widths()
        }

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        return self._blocks[level][step](x, nodes)

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """The leaves' outputs x [leaves * n, width, H, W] -> logits [leaves * n, classes]."""
        for block in self._tails[width]:
            x = block(x, leaves)
        return self.classify(x)

    def _affines(self, block: Block, moments: Sequence[Moments]) -> list[Affine]:
        batches = self._statistics.batches
        pairs = zip(block.norms, moments, strict=True)
        return [scale_and_shift(norm, sums.mean / batches, sums.var / batches) for norm, sums in pairs]


class SegmentedBlock:
    """A block with weights that its nodes share and a scale and shift of each node."""

    def __init__(self, block: Block, affines: Sequence[Affine], dtype: torch.dtype) -> None:
        self.plan = plan_of(block)
        self.weights = [weight.detach().to(dtype).contiguous() for weight in sliced_weights(block)]
        self.affines = affines

    def __call__(self, x: Tensor, nodes: range) -> Tensor:
        """x [nodes * n, inputs, H, W] -> [nodes * n, outputs, H', W']."""
        rows = slice(nodes.start, nodes.stop)

        def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
            scale, shift = self.affines[index]
            return segmented(each, y, self.weights[index], scale[rows], shift[rows], residual)

        return run(self.plan, x, layer)
