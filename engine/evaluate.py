"""Scoring subnets with the weights they inherit: thousands of them as one batched job.

    evaluator = Evaluator(supernet, search_val, device=device, store=run.evaluations)
    scores = evaluator.evaluate(archs)

Everything that scores subnets (shrinking, evolution, ranking) goes through `Evaluator.evaluate`. The architectures of
a call form a prefix tree (engine/prefix_tree.py) that images pass in chunks (engine/tree_runner.py), with batch
normalisation folded from running statistics (engine/folded.py) or recalibrated (engine/recalibration.py). Images are
split over the ranks of torch.distributed; counts are summed, so the result does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from engine.errors import UserError
from engine.evaluation_progress import EvaluationProgress
from engine.folded import FoldedLayers
from engine.memory import Memory, is_out_of_memory
from engine.prefix_tree import PrefixTree
from engine.recalibration import (
    RecalibratedLayers,
    StatisticsLayers,
    TreeStatistics,
    statistics_bytes,
)
from engine.space import Arch
from engine.store import EvaluationStore, StoreKey, Tally
from engine.supernet import Supernet
from engine.tree_runner import Layers, TreeRunner

BatchNormMode = Literal["running", "recalibrate"]
"""Which statistics score a subnet.

- `running`: those that training left in each operation (the paper's way).
- `recalibrate`: each subnet's own, from training images (SPOS, OFA).
"""

RECALIBRATION_BATCH = 128
"""Images per batch of recalibration; a smaller set is one batch."""
RECALIBRATION_PART = 512
"""Architectures that are recalibrated and then scored together: what a kill can lose."""


class Score(NamedTuple):
    """What a subnet scored on an evaluation set; top1 and top5 are shares of the images, loss is the mean."""

    top1: float
    top5: float
    loss: float
    images: int
    correct1: int
    correct5: int


class Images(Protocol):
    """What the evaluator needs of an evaluation set (engine.loader.EvaluationSet)."""

    images: np.ndarray
    """uint8 [N, H, W, 3]."""
    labels: np.ndarray
    fingerprint: str

    def normalized(self, device: torch.device, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Images start..stop-1 as [n, 3, H, W], channels_last."""
        ...


class Evaluator:
    """Scores architectures of a supernet on one evaluation set.

    `bn` chooses the statistics; `recalibrate` needs training images in `recalibration`. `memory_budget_mib` bounds
    activations and statistics (default: half of the free memory). Evaluations are kept in the file `store` and taken
    from it; without a file, in this object. Raises `UserError` for bad arguments.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: Images,
        *,
        bn: BatchNormMode = "running",
        recalibration: Images | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        memory_budget_mib: int | None = None,
        store: Path | str | None = None,
        progress: bool = True,
    ) -> None:
        if bn not in get_args(BatchNormMode):
            raise UserError(f"bn {bn!r} is unknown; allowed are {', '.join(get_args(BatchNormMode))}")
        if bn == "recalibrate" and (recalibration is None or len(recalibration.labels) < 2):
            raise UserError(
                "bn recalibrate needs at least 2 training images to compute statistics from; "
                "give some, or score with bn running"
            )
        if len(data.labels) == 0:
            raise UserError("the evaluation set has no images; give at least one")
        self.supernet = supernet
        self.data = data
        self.bn = bn
        self.recalibration = recalibration if bn == "recalibrate" else None
        self.device = torch.device(device)
        self.dtype = dtype
        self.memory = Memory.plan(self.device, memory_budget_mib)
        self.progress = progress
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Only rank 0 reads and writes the file; the others get what it knows.
        self.store = EvaluationStore(store if self.rank == 0 else None)
        self._resolution = int(data.images.shape[1])
        self._labels = torch.from_numpy(np.asarray(data.labels, dtype=np.int64)).to(self.device)

    def evaluate(self, archs: Sequence[Arch]) -> list[Score]:
        """The scores of architectures, in order. Repeated and stored ones cost nothing.

        Raises `UserError` for an architecture outside the supernet's space, or when one image does not fit in memory.
        """
        for arch in archs:
            self.supernet.space.check(arch)
        distinct = list(dict.fromkeys(archs))
        key = self._key()
        tallies = self._known(key, distinct)
        images = len(self.data.labels)
        missing = sum(images - tally.seen for tally in tallies.values())
        shown = self.progress and self.rank == 0 and missing > 0
        with EvaluationProgress(shown, "evaluating subnets", missing) as self._bar:
            while pending := [arch for arch in distinct if tallies[arch].seen < images]:
                # Those that a killed evaluation left furthest behind catch up first; then all go on together.
                start = min(tallies[arch].seen for arch in pending)
                stop = min((tallies[arch].seen for arch in pending if tallies[arch].seen > start), default=images)
                behind = [arch for arch in pending if tallies[arch].seen == start]
                for part in self._parts(behind):
                    for counts in self._count(part, start, stop):
                        for arch, count in zip(part, counts, strict=True):
                            tallies[arch] = tallies[arch].plus(count)
                        if self.rank == 0:
                            self.store.save(key, {str(arch): tallies[arch] for arch in part})
        return [_score(tallies[arch]) for arch in archs]

    # ---- what is known

    def _key(self) -> StoreKey:
        mode = f"{self.bn} {str(self.dtype).removeprefix('torch.')}"
        if self.recalibration is not None:
            mode += f" {self.recalibration.fingerprint} batch {self._recalibration_batch}"
        return StoreKey(weights_fingerprint(self.supernet), self.data.fingerprint, mode)

    def _known(self, key: StoreKey, archs: Sequence[Arch]) -> dict[Arch, Tally]:
        stored = self.store.load(key) if self.rank == 0 else {}
        tallies = [stored.get(str(arch), Tally()) for arch in archs]
        if self.world > 1:
            box = [tallies]
            dist.broadcast_object_list(box, src=0)
            tallies = box[0]
        return dict(zip(archs, tallies, strict=True))

    @property
    def _recalibration_batch(self) -> int:
        assert self.recalibration is not None
        return min(RECALIBRATION_BATCH, len(self.recalibration.labels))

    # ---- counting

    def _parts(self, archs: Sequence[Arch]) -> list[list[Arch]]:
        """The architectures that run together: all, or as many as have room for statistics of their own."""
        if self.bn == "running":
            return [list(archs)]
        space = self.supernet.space
        largest = max(statistics_bytes(space.supernet_dims(arch), space.tail_channels) for arch in archs)
        size = max(1, min(RECALIBRATION_PART, self.memory.statistics // largest))
        ordered = sorted(archs, key=lambda arch: arch.operations)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def _count(self, archs: Sequence[Arch], start: int, stop: int) -> Iterator[list[Tally]]:
        """Score images start..stop-1, round by round; each yields the counts of that round for every architecture.

        A round is a chunk of images for every rank.
        """
        tree = PrefixTree(self.supernet.space, archs, self._resolution)
        layers = self._layers(tree)
        chunk = self.memory.chunk_images(tree, self.dtype.itemsize)
        for first in range(start, stop, chunk * self.world):
            last = min(first + chunk * self.world, stop)
            bounds = [first + (last - first) * r // self.world for r in range(self.world + 1)]
            counts = self._count_slice(tree, layers, bounds[self.rank], bounds[self.rank + 1], chunk)
            yield counts.summed_over_ranks(self.world).tallies(last - first)

    def _layers(self, tree: PrefixTree) -> Layers:
        if self.recalibration is None:
            return FoldedLayers(self.supernet, self.dtype)
        return RecalibratedLayers(self.supernet, self._recalibrate(tree), self.dtype)

    def _count_slice(self, tree: PrefixTree, layers: Layers, start: int, stop: int, chunk: int) -> "Counts":
        """The counts of this rank's images. Out of memory, the chunk is halved and the work goes on."""
        total = Counts.zeros(len(tree.leaves))
        while start < stop:
            end = min(start + chunk, stop)
            try:
                total.add(self._count_chunk(tree, layers, start, end))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if end - start == 1:
                    raise UserError(
                        f"one image of {self._resolution} pixels does not fit in the memory of {self.device}; "
                        "give a smaller memory budget or a smaller resolution"
                    ) from None
                chunk = (end - start) // 2
                self.memory = self.memory.halved()
                _release_cached_memory(self.device)
                continue
            start = end
        return total

    def _count_chunk(self, tree: PrefixTree, layers: Layers, start: int, stop: int) -> "Counts":
        images = self.data.normalized(self.device, self.dtype, start, stop)
        labels = self._labels[start:stop]
        counts = Counts.zeros(len(tree.leaves))
        for leaves, logits in TreeRunner(tree, layers, self.memory, self.dtype).run(images):
            counts.record([tree.leaves[leaf] for leaf in leaves], logits, labels)
            self._bar.advance(len(leaves) * len(labels) * self.world)
        return counts

    def _recalibrate(self, tree: PrefixTree) -> TreeStatistics:
        """Run the recalibration images through the tree; batches are shared out over the ranks."""
        assert self.recalibration is not None
        size = self._recalibration_batch
        batches = len(self.recalibration.labels) // size
        statistics = TreeStatistics.zeros(self.supernet, tree)
        layers = StatisticsLayers(self.supernet, statistics, self.dtype)
        for batch in range(self.rank, batches, self.world):
            images = self.recalibration.normalized(self.device, self.dtype, batch * size, (batch + 1) * size)
            for _ in TreeRunner(tree, layers, self.memory, self.dtype).run(images):
                pass
        statistics.batches = batches
        if self.world > 1:
            for tensor in statistics.tensors():
                dist.all_reduce(tensor)
        return statistics


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


def weights_fingerprint(supernet: Supernet) -> str:
    """A hash of everything that scoring reads: weights, biases and running statistics, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(supernet.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _score(tally: Tally) -> Score:
    images = tally.seen
    return Score(
        top1=tally.correct1 / images,
        top5=tally.correct5 / images,
        loss=tally.loss_sum / images,
        images=images,
        correct1=tally.correct1,
        correct5=tally.correct5,
    )


def _release_cached_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
