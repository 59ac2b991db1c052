"""Scoring subnets with the weights they inherit: thousands of them as one batched job.

    evaluator = Evaluator(supernet, search_val, device=device, store=run.evaluations)
    scores = evaluator.evaluate(archs)

Everything that scores subnets (shrinking, evolution, ranking) goes through `Evaluator.evaluate`. The architectures of a
call form a prefix tree (engine/evaluation/tree.py) that images pass in chunks (engine/evaluation/walk.py), with batch
normalisation folded from running statistics (engine/evaluation/folded.py) or recalibrated
(engine/evaluation/recalibration.py). Images are split over the ranks of torch.distributed; counts are summed, so the
result does not depend on the number of ranks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import distributed as dist

from bsnas.engine.evaluation.chunk_workers import worker_count
from bsnas.engine.evaluation.counting import Ranks, RoundRunner, recalibration_batch
from bsnas.engine.evaluation.early_decisions import Placement, Quotas, place_early
from bsnas.engine.evaluation.images import Images, ScoredImages
from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.progress import EvaluationProgress
from bsnas.engine.evaluation.store import EvaluationStore, StoreKey, Tally
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.preemption import deferred, stop_here
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.space import Arch

BatchNormMode = Literal["running", "recalibrate"]
"""Which statistics score a subnet.

- `running`: those that training left in each operation (the paper's way).
- `recalibrate`: each subnet's own, from training images (SPOS, OFA).
"""


class Score(NamedTuple):
    """What a subnet scored on an evaluation set; top1 and top5 are shares of the images, loss is the mean."""

    top1: float
    top5: float
    loss: float
    images: int
    correct1: int
    correct5: int
    complete: bool = True
    """Whether the evaluation set has no other images."""


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
        store: EvaluationStore | Path | str | None = None,
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
        self.bn = bn
        self.device = torch.device(device)
        self.dtype = dtype
        self.progress = progress
        self.ranks = Ranks.current()
        self.memory = Memory.plan(self.device, memory_budget_mib, worker_count(self.device))
        self.data = ScoredImages(data, self.device, self.memory.images)
        self.recalibration = (
            ScoredImages(recalibration, self.device, 0) if bn == "recalibrate" and recalibration is not None else None
        )
        # Only rank 0 reads and writes the file; the others get what it knows.
        if not isinstance(store, EvaluationStore):
            store = EvaluationStore(store if self.ranks.rank == 0 else None)
        self.store: EvaluationStore = store
        mode = f"{bn} {str(dtype).removeprefix('torch.')}"
        if self.recalibration is not None and recalibration is not None:
            mode += f" {recalibration.fingerprint} batch {recalibration_batch(len(self.recalibration))}"
        self._fingerprints = (data.fingerprint, mode)

    def evaluate(self, archs: Sequence[Arch]) -> list[Score]:
        """The scores of architectures, in order. Repeated and stored ones cost nothing.

        Raises `UserError` for an architecture outside the supernet's space, or when one image does not fit in memory.
        """
        images = len(self.data)
        with self._job("evaluating subnets", archs) as job:
            while pending := [arch for arch in job.tallies if job.tallies[arch].seen < images]:
                # Those that a killed evaluation left furthest behind catch up first; then all go on together.
                seen = {arch: job.tallies[arch].seen for arch in pending}
                start = min(seen.values())
                stop = min((s for s in seen.values() if s > start), default=images)
                job.run([arch for arch in pending if seen[arch] == start], start, stop)
        return [self._score(job.tallies[arch]) for arch in archs]

    def place(self, archs: Sequence[Arch], quotas: Quotas, *, confidence: float = 0.999) -> Placement:
        """Which architectures are the best and the worst, each evaluated only until its place is certain.

        Raises `UserError` as `evaluate` does, for impossible quotas, for a confidence that is none, and with
        recalibrated statistics, which would have to be computed for all anyway.
        """
        quotas.check(len(archs))
        if not 0.5 < confidence < 1:
            raise UserError(f"confidence {confidence} is no confidence; give a number between 0.5 and 1, as 0.999")
        if self.recalibration is not None:
            raise UserError("early decisions need bn running; evaluate all images to score with bn recalibrate")
        with self._job("placing subnets", archs) as job:
            return place_early(archs, quotas, confidence, len(self.data), job.tallies, job.run)

    def seen_so_far(self, archs: Sequence[Arch]) -> list[Score]:
        """What is stored of architectures that `place` has seen, on the images that each saw; nothing is computed."""
        key = StoreKey(weights_fingerprint(self.supernet), *self._fingerprints)
        tallies = self._known(key, list(dict.fromkeys(archs)))
        return [self._score(tallies[arch]) for arch in archs]

    # ---- one call

    @contextmanager
    def _job(self, title: str, archs: Sequence[Arch]) -> Iterator["_Job"]:
        for arch in archs:
            self.supernet.space.check(arch)
        key = StoreKey(weights_fingerprint(self.supernet), *self._fingerprints)
        tallies = self._known(key, list(dict.fromkeys(archs)))
        missing = sum(len(self.data) - tally.seen for tally in tallies.values())
        shown = self.progress and self.ranks.rank == 0 and missing > 0
        with deferred(), EvaluationProgress(shown, title, missing) as bar:
            runner = RoundRunner(
                self.supernet,
                self.data,
                self.recalibration,
                memory=self.memory,
                device=self.device,
                dtype=self.dtype,
                ranks=self.ranks,
                advance=bar.advance,
            )
            yield _Job(runner, self.store if self.ranks.rank == 0 else None, key, tallies)

    def _score(self, tally: Tally) -> Score:
        images = tally.seen
        return Score(
            top1=tally.correct1 / images,
            top5=tally.correct5 / images,
            loss=tally.loss_sum / images,
            images=images,
            correct1=tally.correct1,
            correct5=tally.correct5,
            complete=images == len(self.data),
        )

    def _known(self, key: StoreKey, archs: Sequence[Arch]) -> dict[Arch, Tally]:
        box: list[Any] = [None]
        if self.ranks.rank == 0:
            try:
                box[0] = self._stored(key, archs)
            except UserError as error:
                box[0] = error
        if self.ranks.world > 1:
            dist.broadcast_object_list(box, src=0)
        if isinstance(box[0], UserError):
            raise box[0]
        return dict(zip(archs, box[0], strict=True))

    def _stored(self, key: StoreKey, archs: Sequence[Arch]) -> list[Tally]:
        stored = self.store.load(key)
        tallies = [stored.get(str(arch), Tally()) for arch in archs]
        if any(tally.seen > len(self.data) for tally in tallies):
            raise UserError(
                f"stored evaluations are of more images than the {len(self.data)} of this set; "
                "restore the file of evaluations, or remove it to score anew"
            )
        return tallies


@dataclass
class _Job:
    """The work of one call: what is known of its architectures, and how to know more."""

    runner: RoundRunner
    store: EvaluationStore | None
    key: StoreKey
    tallies: dict[Arch, Tally]

    def run(self, archs: Sequence[Arch], start: int, stop: int) -> None:
        """Add images start..stop-1 to the tallies of architectures that saw the `start` before; saved every round.

        Raises `Preempted` between rounds when a rank was told to stop: the next evaluation goes on from there.
        """
        for part in self.runner.parts(archs):
            for counts in self.runner.rounds(part, start, stop):
                for arch, tally in zip(part, counts.tallies(), strict=True):
                    self.tallies[arch] = self.tallies[arch].plus(tally)
                if self.store is not None:
                    self.store.save(self.key, {str(arch): self.tallies[arch] for arch in part})
                stop_here(agreed=self.runner.ranks.told_to_stop())


def weights_fingerprint(supernet: Supernet) -> str:
    """A hash of everything that scoring reads: weights, biases and running statistics, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(supernet.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
