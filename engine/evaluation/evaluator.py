"""Scoring subnets with the weights they inherit: thousands of them as one batched job.

    evaluator = Evaluator(supernet, search_val, process=process, store=run.evaluations)
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
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch

from bsnas.engine.checkpoints.old_names import old_name
from bsnas.engine.evaluation.counting import Counting
from bsnas.engine.evaluation.early_decisions import Placement, Quotas, place_early
from bsnas.engine.evaluation.images import Images, ScoredImages
from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.recalibration import recalibration_batch
from bsnas.engine.evaluation.store import EvaluationStore, StoreKey, Tally
from bsnas.engine.evaluation.workers import worker_count
from bsnas.engine.host.console import Progress
from bsnas.engine.host.distributed import Process, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.preemption import deferred
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.canonical import canonical

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

    `process` says which device and which share of the images are this rank's; by default it is on the CPU.
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
        process: Process | None = None,
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
        self.process = process or Process.current(torch.device("cpu"))
        self.dtype = dtype
        self.progress = progress
        device = self.process.device
        self.memory = Memory.plan(device, memory_budget_mib, worker_count(device))
        self.data = ScoredImages(data, device, self.memory.images)
        self.recalibration = (
            ScoredImages(recalibration, device, 0) if bn == "recalibrate" and recalibration is not None else None
        )
        # Only the main process reads and writes the file; the others get what it knows.
        if not isinstance(store, EvaluationStore):
            store = EvaluationStore(store if self.process.is_main else None)
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
        archs = self._canonical(archs)
        with self._counting("evaluating subnets", archs) as counting:
            while seen := {arch: tally.seen for arch, tally in counting.tallies.items() if tally.seen < images}:
                # Those that a killed evaluation left furthest behind catch up first; then all go on together.
                start, *ahead = sorted(set(seen.values()))
                counting.add([arch for arch in seen if seen[arch] == start], start, min(ahead, default=images))
        return [self._score(counting.tallies[arch]) for arch in archs]

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
        archs = self._canonical(archs)
        with self._counting("placing subnets", archs) as counting:
            return place_early(archs, quotas, confidence, len(self.data), counting.tallies, counting.add)

    def seen_so_far(self, archs: Sequence[Arch]) -> list[Score]:
        """What is stored of architectures that `place` has seen, on the images that each saw; nothing is computed."""
        archs = self._canonical(archs)
        tallies = self._known(self._key(), archs)
        return [self._score(tallies[arch]) for arch in archs]

    def _canonical(self, archs: Sequence[Arch]) -> list[Arch]:
        """Texts that mean the same network are scored as one. Raises `UserError` for one outside the space."""
        for arch in archs:
            self.supernet.space.check(arch)
        return [canonical(self.supernet.space, arch) for arch in archs]

    # ---- one call

    @contextmanager
    def _counting(self, title: str, archs: Sequence[Arch]) -> Iterator[Counting]:
        """What is known of the architectures, and the means to know more."""
        key = self._key()
        tallies = self._known(key, archs)
        missing = sum(len(self.data) - tally.seen for tally in tallies.values())
        shown = self.progress and self.process.is_main and missing > 0

        def save(added: dict[Arch, Tally]) -> None:
            if self.process.is_main:
                self.store.save(key, {str(arch): tally for arch, tally in added.items()})

        with deferred(), Progress(title, missing, unit="images", enabled=shown) as bar:
            yield Counting(
                self.supernet,
                self.data,
                self.recalibration,
                tallies,
                memory=self.memory,
                dtype=self.dtype,
                process=self.process,
                save=save,
                progress=bar,
            )

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

    def _key(self) -> StoreKey:
        return StoreKey(weights_fingerprint(self.supernet), *self._fingerprints)

    def _known(self, key: StoreKey, archs: Sequence[Arch]) -> dict[Arch, Tally]:
        """What is stored of each different architecture, in the order in which they are given first."""
        distinct = list(dict.fromkeys(archs))
        return dict(zip(distinct, on_main(self.process, lambda: self._stored(key, distinct)), strict=True))

    def _stored(self, key: StoreKey, archs: Sequence[Arch]) -> list[Tally]:
        stored = self.store.load(key)
        tallies = [stored.get(str(arch), Tally()) for arch in archs]
        if any(tally.seen > len(self.data) for tally in tallies):
            raise UserError(
                f"stored evaluations are of more images than the {len(self.data)} of this set; "
                "restore the file of evaluations, or remove it to score anew"
            )
        return tallies


def weights_fingerprint(supernet: Supernet) -> str:
    """A hash of everything that scoring reads: weights, biases and running statistics, bit for bit."""
    digest = hashlib.sha256()
    named = ((old_name(name), tensor) for name, tensor in supernet.state_dict().items())
    for name, tensor in sorted(named, key=itemgetter(0)):  # by the names of before: what is stored by them is found
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
