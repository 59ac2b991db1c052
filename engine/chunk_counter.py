"""Counting correct answers of all architectures of a tree, a chunk of images at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from engine.errors import UserError
from engine.memory import Memory, is_out_of_memory
from engine.prefix_tree import PrefixTree
from engine.store import Tally
from engine.tree_runner import Layers, TreeRunner

Advance = Callable[[int], None]
"""Told how many model-images (models x images) are done, or, negative, have to be done again."""


class Images(Protocol):
    """What the evaluator needs of an evaluation set (engine.evaluation_set.EvaluationSet)."""

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of images, labels and normalisation."""
        ...

    def normalized(self, device: torch.device, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Images start..stop-1 as [n, 3, H, W], channels_last."""
        ...


class Counts:
    """Correct answers and losses of some architectures: correct1, correct5 int64 [archs], loss float64 [archs]."""

    def __init__(self, correct1: np.ndarray, correct5: np.ndarray, loss: np.ndarray) -> None:
        self.correct1, self.correct5, self.loss = correct1, correct5, loss

    @classmethod
    def zeros(cls, archs: int) -> "Counts":
        return cls(np.zeros(archs, np.int64), np.zeros(archs, np.int64), np.zeros(archs))

    def record(self, archs: Sequence[int], logits: Tensor, labels: Tensor) -> None:
        """Add logits [archs, n, classes] of images with labels [n]."""
        count, images, classes = logits.shape
        logits = logits.float()
        best = logits.topk(min(5, classes), dim=-1).indices
        hits = best == labels[None, :, None]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(count), reduction="none").view(count, images)
        self.correct1[archs] += hits[:, :, 0].sum(1).cpu().numpy()
        self.correct5[archs] += hits.any(-1).sum(1).cpu().numpy()
        self.loss[archs] += losses.double().sum(1).cpu().numpy()

    @classmethod
    def sum(cls, parts: Sequence["Counts"]) -> "Counts":
        total = cls.zeros(len(parts[0].loss))
        for part in parts:
            total.add(part)
        return total

    def add(self, other: "Counts") -> None:
        self.correct1 += other.correct1
        self.correct5 += other.correct5
        self.loss += other.loss

    def summed_over_ranks(self, world: int) -> "Counts":
        if world == 1:
            return self
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = []
        for counts in (self.correct1, self.correct5, self.loss):
            tensor = torch.from_numpy(counts).to(device)
            dist.all_reduce(tensor)
            sums.append(tensor.cpu().numpy())
        return Counts(*sums)

    def tallies(self, images: int) -> list[Tally]:
        columns = zip(self.correct1.tolist(), self.correct5.tolist(), self.loss.tolist(), strict=True)
        return [Tally(images, *row) for row in columns]


class ChunkCounter:
    """Runs ranges of images through a tree in chunks that fit in memory. Several threads may use one."""

    def __init__(
        self,
        tree: PrefixTree,
        layers: Layers,
        data: Images,
        memory: Memory,
        device: torch.device,
        dtype: torch.dtype,
        advance: Advance,
    ) -> None:
        self.tree = tree
        self.layers = layers
        self.data = data
        self.memory = memory
        self.device = device
        self.dtype = dtype
        self.advance = advance
        self.chunk = memory.chunk_images(tree, dtype.itemsize)
        """Most images of one pass; halved when memory runs out."""

    def count(self, bounds: tuple[int, int]) -> Counts:
        """The counts on images start..stop-1. Out of memory, the chunk is halved and the work goes on.

        Raises `UserError` when one image is too many.
        """
        start, stop = bounds
        total = Counts.zeros(len(self.tree.leaves))
        while start < stop:
            end = min(start + self.chunk, stop)
            try:
                total.add(self._count_chunk(start, end))
                start = end
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._use_less_memory(end - start)
        return total

    def _use_less_memory(self, images: int) -> None:
        if images == 1:
            raise UserError(
                f"one image of {self.tree.resolution} pixels does not fit in the memory of {self.device}; "
                "end other programs there, or give a smaller memory budget"
            )
        self.chunk = images // 2
        self.memory = self.memory.halved()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _count_chunk(self, start: int, stop: int) -> Counts:
        images = self.data.normalized(self.device, self.dtype, start, stop)
        labels = torch.from_numpy(np.array(self.data.labels[start:stop], np.int64)).to(self.device)
        counts = Counts.zeros(len(self.tree.leaves))
        done = 0
        try:
            for leaves, logits in TreeRunner(self.tree, self.layers, self.memory, self.dtype).run(images):
                counts.record([self.tree.leaves[leaf] for leaf in leaves], logits, labels)
                done += len(leaves) * len(labels)
                self.advance(len(leaves) * len(labels))
        except RuntimeError:
            self.advance(-done)
            raise
        return counts
