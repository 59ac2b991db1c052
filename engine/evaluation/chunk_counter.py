"""Counting correct answers of all architectures of a tree, a chunk of images at a time."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from bsnas.engine.evaluation.images import ScoredImages
from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.store import Tally
from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.evaluation.walk import Layers, TreeRunner
from bsnas.engine.host.errors import UserError, is_out_of_memory

Advance = Callable[[int], None]
"""Told how many model-images (models x images) are done, or, negative, have to be done again."""


class Counts:
    """What some architectures answered to consecutive images.

    answers: whether the first answer is right, bool [archs, n]; correct5 int64 [archs]; loss: sums, float64 [archs].
    """

    def __init__(self, answers: np.ndarray, correct5: np.ndarray, loss: np.ndarray) -> None:
        self.answers, self.correct5, self.loss = answers, correct5, loss

    @classmethod
    def zeros(cls, archs: int, images: int) -> "Counts":
        return cls(np.zeros((archs, images), bool), np.zeros(archs, np.int64), np.zeros(archs))

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

    def joined_over_ranks(self, world: int, before: int, images: int) -> "Counts":
        """The counts on all `images` of a round, of which `before` belong to lower ranks than this one."""
        if world == 1:
            return self
        answers = np.zeros((len(self.loss), images), np.uint8)
        answers[:, before : before + self.answers.shape[1]] = self.answers
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = []
        for counts in (answers, self.correct5, self.loss):
            tensor = torch.from_numpy(counts).to(device)
            dist.all_reduce(tensor)
            sums.append(tensor.cpu().numpy())
        return Counts(sums[0].astype(bool), sums[1], sums[2])

    def tallies(self) -> list[Tally]:
        columns = zip(self.answers, self.correct5.tolist(), self.loss.tolist(), strict=True)
        return [Tally.of(*row) for row in columns]


class ChunkCounter:
    """Runs ranges of images through a tree in chunks that fit in memory. Several threads may use one."""

    def __init__(
        self,
        tree: PrefixTree,
        layers: Layers,
        data: ScoredImages,
        memory: Memory,
        dtype: torch.dtype,
        chunk: int,
        advance: Advance,
    ) -> None:
        self.tree = tree
        self.layers = layers
        self.data = data
        self.memory = memory
        self.dtype = dtype
        self.chunk = chunk
        """Most images of one pass; halved when memory runs out."""
        self.advance = advance
        self._runner = TreeRunner(tree, layers, memory, dtype)

    def count(self, bounds: tuple[int, int]) -> Counts:
        """The counts on images start..stop-1. Out of memory, the chunk is halved and the work goes on.

        Raises `UserError` when one image is too many.
        """
        start, stop = bounds
        parts = [Counts.zeros(len(self.tree.leaves), 0)]
        while start < stop:
            end = min(start + self.chunk, stop)
            counts = self._count_if_it_fits(start, end)
            if counts is None:
                self._use_less_memory(end - start)
            else:
                parts.append(counts)
                start = end
        return Counts.joined(parts)

    def _count_if_it_fits(self, start: int, stop: int) -> Counts | None:
        """None when memory ran out: only outside is what the failed pass held free, and the exception with it."""
        try:
            return self._count_chunk(start, stop)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        return None

    def _use_less_memory(self, images: int) -> None:
        if images == 1:
            raise UserError(
                f"one image of {self.tree.resolution} pixels does not fit in the memory of {self.data.labels.device}; "
                "end other programs there, or give a smaller memory budget"
            )
        self.chunk = images // 2
        self.memory = self.memory.halved()
        self._runner = TreeRunner(self.tree, self.layers, self.memory, self.dtype)
        torch.cuda.empty_cache()

    def _count_chunk(self, start: int, stop: int) -> Counts:
        images, labels = self.data.normalized(start, stop, self.dtype), self.data.labels[start:stop]
        counts = Counts.zeros(len(self.tree.leaves), stop - start)
        done = 0
        try:
            for leaves, logits in self._runner.run(images):
                counts.record([self.tree.leaves[leaf] for leaf in leaves], logits, labels)
                done += len(leaves) * len(labels)
                self.advance(len(leaves) * len(labels))
        except (RuntimeError, MemoryError):
            self.advance(-done)
            raise
        return counts
