"""Rounds of an evaluation: in one, every worker of every rank takes a chunk of images through the tree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import distributed as dist

from bsnas.engine.evaluation.chunk_counter import Advance, ChunkCounter, Counts
from bsnas.engine.evaluation.chunk_workers import RunAll, chunk_workers, worker_count
from bsnas.engine.evaluation.folded import FoldedLayers
from bsnas.engine.evaluation.images import ScoredImages
from bsnas.engine.evaluation.memory import MIB, Memory
from bsnas.engine.evaluation.recalibration import RecalibratedLayers, StatisticsLayers, TreeStatistics, statistics_bytes
from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.evaluation.walk import Layers, TreeRunner
from bsnas.engine.host.errors import UserError, is_out_of_memory
from bsnas.engine.host.preemption import requested, stop_here
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.space import Arch

RECALIBRATION_BATCH = 128
"""Images per batch of recalibration; a smaller set is one batch."""
RECALIBRATION_PART = 512
"""Architectures that are recalibrated and then scored together: what a kill can lose."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that evaluate together."""

    rank: int
    world: int

    @classmethod
    def current(cls) -> "Ranks":
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)

    def smallest(self, value: int) -> int:
        """The smallest of the ranks' values, so that all divide the work in the same way."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
        return int(tensor)

    def told_to_stop(self) -> bool:
        """Whether any rank was told to stop; equal on all."""
        return self.smallest(-int(requested())) < 0


class RoundRunner:
    """Scores architectures of one supernet on one evaluation set, round by round, on all ranks."""

    def __init__(
        self,
        supernet: Supernet,
        data: ScoredImages,
        recalibration: ScoredImages | None,
        *,
        memory: Memory,
        device: torch.device,
        dtype: torch.dtype,
        ranks: Ranks,
        advance: Advance,
    ) -> None:
        self.supernet = supernet
        self.data = data
        self.recalibration = recalibration
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.ranks = ranks
        self.workers = ranks.smallest(worker_count(device))
        self.advance = advance
        self._folded: FoldedLayers | None = None

    def parts(self, archs: Sequence[Arch]) -> list[list[Arch]]:
        """The architectures that run together: all, or as many as have room for statistics of their own."""
        if self.recalibration is None:
            return [list(archs)]
        space = self.supernet.space
        largest = max(statistics_bytes(space.supernet_dims(arch), space.tail_channels) for arch in archs)
        size = self.ranks.smallest(max(1, min(RECALIBRATION_PART, self.memory.statistics // largest)))
        ordered = sorted(archs, key=lambda arch: arch.operations)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def rounds(self, archs: Sequence[Arch], start: int, stop: int) -> Iterator[Counts]:
        """Score images start..stop-1; yields the counts of each round for every architecture, equal on all ranks.

        Rounds begin and end where they would if nothing had been counted before, so an evaluation that was killed ends
        with the same sums.
        """
        tree = PrefixTree(self.supernet.space, archs, self.data.resolution)
        chunk = self.ranks.smallest(self.memory.chunk_images(tree, self.dtype.itemsize))
        chunks = self.ranks.world * self.workers
        grid = even_bounds(len(self.data), chunk * chunks)
        own = slice(self.ranks.rank * self.workers, (self.ranks.rank + 1) * self.workers)
        with chunk_workers(self.workers) as run_all:
            layers = self._layers(tree, run_all)
            counter = ChunkCounter(tree, layers, self.data, self.memory, self.dtype, chunk, self._advance)
            for first, last in pairwise([start, *(bound for bound in grid if start < bound < stop), stop]):
                bounds = [first + (last - first) * i // chunks for i in range(chunks + 1)]
                mine = list(pairwise(bounds))[own]
                counts = Counts.joined(run_all(counter.count, mine))
                yield counts.joined_over_ranks(self.ranks.world, mine[0][0] - first, last - first)

    def _advance(self, model_images: int) -> None:
        if self.ranks.world == 1:  # several agree between rounds (engine/evaluation/evaluator.py)
            stop_here()
        self.advance(model_images * self.ranks.world)

    def _layers(self, tree: PrefixTree, run_all: RunAll) -> Layers:
        if self.recalibration is not None:
            statistics = self._recalibrate(tree, self.recalibration, run_all)
            return RecalibratedLayers(self.supernet, tree, statistics, self.dtype)
        if self._folded is None:
            self._folded = FoldedLayers(self.supernet, self.data.resolution, self.dtype)
        self._folded.prepare(tree)
        return self._folded

    def _recalibrate(self, tree: PrefixTree, images: ScoredImages, run_all: RunAll) -> TreeStatistics:
        """The statistics of every node. Out of memory, it starts again and holds half as many nodes at once."""
        while (statistics := self._statistics_if_they_fit(tree, images, run_all)) is None:
            if self.memory.activations < MIB:
                raise UserError(
                    f"a batch of {recalibration_batch(len(images))} images does not fit in the memory of "
                    f"{self.device}; end other programs there, or score with bn running"
                )
            self.memory = self.memory.halved()
            torch.cuda.empty_cache()
        if self.ranks.world > 1:
            for tensor in statistics.tensors():
                dist.all_reduce(tensor)
        return statistics

    def _statistics_if_they_fit(self, tree: PrefixTree, images: ScoredImages, run_all: RunAll) -> TreeStatistics | None:
        """None when memory ran out: only outside is what the failed pass held free, and the exception with it."""
        try:
            return self._add_statistics(tree, images, run_all)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _add_statistics(self, tree: PrefixTree, images: ScoredImages, run_all: RunAll) -> TreeStatistics:
        """This rank's sums: batches are shared out over ranks and workers."""
        size = recalibration_batch(len(images))
        batches = len(images) // size
        statistics = TreeStatistics.zeros(self.supernet, tree, batches)
        layers = StatisticsLayers(self.supernet, statistics, self.dtype)
        runner = TreeRunner(tree, layers, self.memory, self.dtype)

        def run_batch(batch: int) -> None:
            if self.ranks.world == 1:
                stop_here()
            for _ in runner.run(images.normalized(batch * size, (batch + 1) * size, self.dtype)):
                pass

        run_all(run_batch, range(self.ranks.rank, batches, self.ranks.world))
        return statistics


def recalibration_batch(images: int) -> int:
    """Images per batch when so many are there; those that fill no batch are left out."""
    return min(RECALIBRATION_BATCH, images)


def even_bounds(images: int, largest: int) -> list[int]:
    """Cut 0..images-1 into as few nearly equal ranges as are at most `largest` long; their ends in order."""
    ranges = -(-images // largest)
    return [images * i // ranges for i in range(ranges + 1)]
