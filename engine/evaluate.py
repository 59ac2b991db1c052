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
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import distributed as dist

from engine.chunk_counter import Advance, ChunkCounter, Counts, Images
from engine.chunk_workers import RunAll, chunk_workers, worker_count
from engine.errors import UserError
from engine.evaluation_progress import EvaluationProgress
from engine.folded import FoldedLayers
from engine.memory import MIB, Memory, is_out_of_memory
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
        self.memory = Memory.plan(self.device, memory_budget_mib, worker_count(self.device))
        self.progress = progress
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        # Only rank 0 reads and writes the file; the others get what it knows.
        self.store = EvaluationStore(store if self.rank == 0 else None)

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
        with EvaluationProgress(shown, "evaluating subnets", missing) as bar:
            advance = lambda model_images: bar.advance(model_images * self.world)  # noqa: E731
            while pending := [arch for arch in distinct if tallies[arch].seen < images]:
                # Those that a killed evaluation left furthest behind catch up first; then all go on together.
                start = min(tallies[arch].seen for arch in pending)
                stop = min((tallies[arch].seen for arch in pending if tallies[arch].seen > start), default=images)
                behind = [arch for arch in pending if tallies[arch].seen == start]
                for part in self._parts(behind):
                    for counts in self._count(part, start, stop, advance):
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
        if self.recalibration is None:
            return [list(archs)]
        space = self.supernet.space
        largest = max(statistics_bytes(space.supernet_dims(arch), space.tail_channels) for arch in archs)
        size = max(1, min(RECALIBRATION_PART, self.memory.statistics // largest))
        ordered = sorted(archs, key=lambda arch: arch.operations)
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]

    def _count(self, archs: Sequence[Arch], start: int, stop: int, advance: Advance) -> Iterator[list[Tally]]:
        """Score images start..stop-1, round by round; each yields the counts of that round for every architecture.

        In a round every worker of every rank takes one chunk of images. Rounds begin and end where they would if
        nothing had been counted before, so an evaluation that was killed ends with the same sums.
        """
        tree = PrefixTree(self.supernet.space, archs, self.data.images.shape[1])
        workers = worker_count(self.device)
        with chunk_workers(workers) as run_all:
            counter = ChunkCounter(
                tree, self._layers(tree, run_all), self.data, self.memory, self.device, self.dtype, advance
            )
            chunks = self.world * workers
            grid = even_bounds(0, len(self.data.labels), counter.chunk * chunks)
            rounds = [start, *(bound for bound in grid if start < bound < stop), stop]
            for first, last in pairwise(rounds):
                bounds = [first + (last - first) * i // chunks for i in range(chunks + 1)]
                mine = list(pairwise(bounds))[self.rank * workers : (self.rank + 1) * workers]
                counts = Counts.sum(run_all(counter.count, mine))
                yield counts.summed_over_ranks(self.world).tallies(last - first)

    def _layers(self, tree: PrefixTree, run_all: RunAll) -> Layers:
        if self.recalibration is None:
            return FoldedLayers(self.supernet, tree, self.dtype)
        return RecalibratedLayers(self.supernet, tree, self._recalibrate(tree, run_all), self.dtype)

    def _recalibrate(self, tree: PrefixTree, run_all: RunAll) -> TreeStatistics:
        """The statistics of every node. Out of memory, it starts again and holds half as many nodes at once."""
        while True:
            try:
                return self._run_recalibration(tree, run_all)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.memory.activations < MIB:
                    raise UserError(
                        f"a batch of {self._recalibration_batch} images does not fit in the memory of {self.device}; "
                        "end other programs there, or score with bn running"
                    ) from None
                self.memory = self.memory.halved()

    def _run_recalibration(self, tree: PrefixTree, run_all: RunAll) -> TreeStatistics:
        """Run the recalibration images through the tree; batches are shared out over ranks and workers."""
        assert self.recalibration is not None
        data, size = self.recalibration, self._recalibration_batch
        batches = len(data.labels) // size
        statistics = TreeStatistics.zeros(self.supernet, tree, batches)
        layers = StatisticsLayers(self.supernet, statistics, self.dtype)
        runner = TreeRunner(tree, layers, self.memory, self.dtype)

        def run_batch(batch: int) -> None:
            images = data.normalized(self.device, self.dtype, batch * size, (batch + 1) * size)
            for _ in runner.run(images):
                pass

        run_all(run_batch, range(self.rank, batches, self.world))
        if self.world > 1:
            for tensor in statistics.tensors():
                dist.all_reduce(tensor)
        return statistics


def even_bounds(start: int, stop: int, largest: int) -> list[int]:
    """Cut start..stop-1 into as few nearly equal ranges as are at most `largest` long; their ends in order."""
    ranges = -(-(stop - start) // largest)
    return [start + (stop - start) * i // ranges for i in range(ranges + 1)]


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
