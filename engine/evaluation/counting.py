"""One evaluation under way: images pass a tree of architectures, and answers are added to what is known of each.

Images come in *slices*, which all workers of all ranks share out evenly; a *chunk* is what a worker takes through the
tree at once. After every slice the sums are saved and equal on all ranks, so an evaluation that is killed goes on from
there.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bsnas.engine.evaluation.folded import FoldedLayers
from bsnas.engine.evaluation.images import ScoredImages
from bsnas.engine.evaluation.memory import Budget, Memory
from bsnas.engine.evaluation.recalibration import RecalibratedLayers, recalibrated_statistics, statistics_bytes
from bsnas.engine.evaluation.store import Tally
from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.evaluation.walk import Layers, Walker
from bsnas.engine.evaluation.workers import RunAll, chunk_workers, worker_count
from bsnas.engine.host.console import Progress
from bsnas.engine.host.distributed import Process, smallest, stop_together
from bsnas.engine.host.preemption import stop_here
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch

RECALIBRATION_PART = 512
"""Architectures that are recalibrated and then scored together: what a kill can lose."""


class Counting:
    """Adds answers to `tallies`, what is known of some architectures; `save` is called with those of every slice."""

    def __init__(
        self,
        supernet: Supernet,
        data: ScoredImages,
        recalibration: ScoredImages | None,
        tallies: dict[Arch, Tally],
        *,
        memory: Memory,
        dtype: torch.dtype,
        process: Process,
        save: Callable[[dict[Arch, Tally]], None],
        progress: Progress,
    ) -> None:
        self.supernet = supernet
        self.data = data
        self.recalibration = recalibration
        self.tallies = tallies
        self.memory = memory
        self.budget = Budget(memory)
        self.dtype = dtype
        self.process = process
        self.save = save
        self.progress = progress
        self.workers = smallest(process, worker_count(process.device))
        self._folded: FoldedLayers | None = None

    def add(self, archs: Sequence[Arch], start: int, stop: int) -> None:
        """Add images start..stop-1 to the tallies of architectures that saw the `start` before.

        Raises `Preempted` between slices when a rank was told to stop: the next evaluation goes on from there.
        """
        for part in self._parts(archs):
            tree = PrefixTree(self.supernet.space, part, self.data.resolution)
            chunk = smallest(self.process, self.memory.chunk_images(tree, self.dtype.itemsize))
            with chunk_workers(self.workers) as run_all:
                layers = self._layers(tree, run_all)
                counter = TreeCounter(
                    tree, layers, self.data, self.budget, chunk, self.dtype, self.process, self.progress
                )
                for first, last in self._slices(start, stop, chunk):
                    counts = counter.count(first, last, self.workers, run_all)
                    added = {a: self.tallies[a].plus(t) for a, t in zip(part, counts.tallies(), strict=True)}
                    self.tallies.update(added)
                    self.save(added)
                    stop_together(self.process)

    def _parts(self, archs: Sequence[Arch]) -> list[list[Arch]]:
        """The architectures that run together: all, or as many as have room for statistics of their own."""
        if self.recalibration is None:
            return [list(archs)]
        space = self.supernet.space
        end = space.num_blocks - 1
        largest = max(
            statistics_bytes([*space.supernet_plans(a), *space.tail_plans(space.supernet_width(end, a.operations[-1]))])
            for a in archs
        )
        size = smallest(self.process, max(1, min(RECALIBRATION_PART, self.memory.statistics // largest)))
        ordered = sorted(archs, key=lambda arch: arch.operations)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def _slices(self, start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
        """Images start..stop-1, cut where they would be if nothing had been counted before: an evaluation that was
        killed ends with the same sums."""
        grid = even_bounds(len(self.data), chunk * self.process.world_size * self.workers)
        return pairwise([start, *(bound for bound in grid if start < bound < stop), stop])

    def _layers(self, tree: PrefixTree, run_all: RunAll) -> Layers:
        if self.recalibration is not None:
            statistics = recalibrated_statistics(
                self.supernet, tree, self.recalibration, self.budget, self.dtype, self.process, run_all
            )
            return RecalibratedLayers(self.supernet, tree, statistics, self.dtype)
        if self._folded is None:
            self._folded = FoldedLayers(self.supernet, self.data.resolution, self.dtype)
        self._folded.prepare(tree)
        return self._folded


class TreeCounter:
    """Counts the answers of all architectures of a tree. Its workers share the budget."""

    def __init__(
        self,
        tree: PrefixTree,
        layers: Layers,
        data: ScoredImages,
        budget: Budget,
        chunk: int,
        dtype: torch.dtype,
        process: Process,
        progress: Progress,
    ) -> None:
        self.tree = tree
        self.data = data
        self.budget = budget
        self.chunk = chunk
        """Most images of one walk, while memory has not run out."""
        self.dtype = dtype
        self.process = process
        self.progress = progress
        self._walker = Walker(tree, layers)

    def count(self, first: int, last: int, workers: int, run_all: RunAll) -> "Counts":
        """What every architecture answers to images first..last-1, equal on all ranks.

        Raises `UserError` when one image is too many for the memory.
        """
        shares = self.process.world_size * workers
        bounds = [first + (last - first) * i // shares for i in range(shares + 1)]
        mine = list(pairwise(bounds))[self.process.rank * workers : (self.process.rank + 1) * workers]
        counts = Counts.joined(run_all(self._count_share, mine))
        return counts.joined_over_ranks(self.process, mine[0][0] - first, last - first)

    def _count_share(self, bounds: tuple[int, int]) -> "Counts":
        start, stop = bounds
        parts = [Counts.zeros(len(self.tree.leaves), 0)]
        while start < stop:
            parts.append(
                self.budget.fit(
                    partial(self._count_chunk, start, stop),
                    f"one image of {self.tree.resolution} pixels does not fit in the memory of {self.process.device}; "
                    "end other programs there, or give a smaller memory budget",
                )
            )
            start += parts[-1].images
        return Counts.joined(parts)

    def _count_chunk(self, start: int, stop: int, memory: Memory, halvings: int) -> "Counts":
        """The counts on as many of the images start..stop-1 as go through at once."""
        stop = min(start + max(1, self.chunk >> halvings), stop)
        images, labels = self.data.normalized(start, stop, self.dtype), self.data.labels[start:stop]
        counts = Counts.zeros(len(self.tree.leaves), stop - start)
        done = 0
        try:
            for leaves, logits in self._walker.walk(images, memory):
                counts.record([self.tree.leaves[leaf] for leaf in leaves], logits, labels)
                answered = len(leaves) * len(labels) * self.process.world_size
                self.progress.advance(answered)
                done += answered
                if self.process.world_size == 1:  # several agree between slices
                    stop_here()
        except (RuntimeError, MemoryError):
            self.progress.advance(-done)  # to be done again in smaller pieces
            raise
        return counts


class Counts:
    """What some architectures answered to consecutive images.

    answers: whether the first answer is right, bool [archs, n]; correct5 int64 [archs]; loss: sums, float64 [archs].
    """

    def __init__(self, answers: np.ndarray, correct5: np.ndarray, loss: np.ndarray) -> None:
        self.answers, self.correct5, self.loss = answers, correct5, loss

    @classmethod
    def zeros(cls, archs: int, images: int) -> "Counts":
        return cls(np.zeros((archs, images), bool), np.zeros(archs, np.int64), np.zeros(archs))

    @property
    def images(self) -> int:
        return self.answers.shape[1]

    def record(self, archs: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Set the answers of some architectures: logits [archs, n, classes], labels [n]."""
        count, images, classes = logits.shape
        logits = logits.float()
        best = logits.topk(min(5, classes), dim=-1).indices
        hits = best == labels[None, :, None]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none").view(count, images)
        self.answers[archs] = hits[:, :, 0].cpu().numpy()
        self.correct5[archs] = hits.any(-1).sum(1).cpu().numpy()
        self.loss[archs] = losses.double().sum(1).cpu().numpy()

    @classmethod
    def joined(cls, parts: Sequence["Counts"]) -> "Counts":
        """The counts on all images of consecutive parts."""
        answers = np.concatenate([part.answers for part in parts], axis=1)
        correct5 = np.sum([part.correct5 for part in parts], axis=0)
        return cls(answers, correct5, np.sum([part.loss for part in parts], axis=0))

    def joined_over_ranks(self, process: Process, before: int, images: int) -> "Counts":
        """The counts on all `images` of a slice, of which `before` belong to lower ranks than this one."""
        if process.world_size == 1:
            return self
        answers = np.zeros((len(self.loss), images), np.uint8)
        answers[:, before : before + self.images] = self.answers
        sums = []
        for counts in (answers, self.correct5, self.loss):
            tensor = torch.from_numpy(counts).to(process.device)
            torch.distributed.all_reduce(tensor)
            sums.append(tensor.cpu().numpy())
        return Counts(sums[0].astype(bool), sums[1], sums[2])

    def tallies(self) -> list[Tally]:
        columns = zip(self.answers, self.correct5.tolist(), self.loss.tolist(), strict=True)
        return [Tally.of(*row) for row in columns]


def even_bounds(images: int, largest: int) -> list[int]:
    """Cut 0..images-1 into as few nearly equal ranges as are at most `largest` long; their ends in order."""
    ranges = -(-images // largest)
    return [images * i // ranges for i in range(ranges + 1)]
