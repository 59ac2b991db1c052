"""A run whose supernet is trained: its weights, its data and the evaluator that searches score with."""

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bsnas.engine.checkpoints.checkpoint import load_checkpoint
from bsnas.engine.checkpoints.keep import latest_checkpoint
from bsnas.engine.checkpoints.manifest import Manifest, Progress
from bsnas.engine.checkpoints.tensor_file import load_weights
from bsnas.engine.config import RunConfig
from bsnas.engine.data.dataset import Dataset, open_dataset
from bsnas.engine.data.loading.evaluation_set import EvaluationSet, evaluation_set
from bsnas.engine.evaluation.evaluator import BatchNormMode, Evaluator
from bsnas.engine.host.distributed import Process, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.precision import COMPUTE_DTYPES, default_precision
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.runs.rundir import RunDir


@dataclass(frozen=True)
class TrainedRun:
    """The newest weights of a run, with its space as shrunk so far.

    Every rank opens the run by itself; what would write files is done by the main process first.
    """

    run: RunDir
    config: RunConfig
    process: Process
    supernet: Supernet
    """On the process's device, in evaluation mode."""

    @classmethod
    def open(cls, path: Path | str, process: Process, step: int | None = None) -> "TrainedRun":
        """The newest weights, or those that shrink step `step` (1, 2, ...) scored.

        Raises `UserError` when there is no run, or no such checkpoint in it, or its data is not there.
        """
        run = RunDir.open(path)
        config = run.config()
        checkpoint = latest_checkpoint(run.checkpoints) if step is None else _scored_at(run, config, step)
        if checkpoint is None:
            raise UserError(f"{run.path} holds no checkpoint yet; train it first with engine/train.py --run {path}")
        space, state = load_checkpoint(checkpoint, config.space)
        supernet = Supernet(space, config.sharing)
        load_weights(supernet, state.get("supernet"), checkpoint)
        return cls(run, config, process, supernet.to(process.device).eval())

    @cached_property
    def data(self) -> Dataset:
        return on_main(self.process, lambda: open_dataset(self.config.data, self.run.split_file))

    @cached_property
    def search_val(self) -> EvaluationSet:
        """The search-validation images, decoded."""
        return evaluation_set(self.data.search_val, self.config.data)

    def evaluator(self, bn: BatchNormMode | None = None) -> Evaluator:
        """Scores subnets on the search-validation set; results are kept in the run directory.

        `bn` is the run's own mode unless given.
        """
        return evaluator_of(self.run, self.config, self.process, self.data, self.search_val, self.supernet, bn)


def evaluator_of(
    run: RunDir,
    config: RunConfig,
    process: Process,
    data: Dataset,
    search_val: EvaluationSet,
    supernet: Supernet,
    bn: BatchNormMode | None = None,
) -> Evaluator:
    """Scores subnets as a run's configuration says, and keeps the results in its directory."""
    bn = bn or config.shrink.bn
    return Evaluator(
        supernet,
        search_val,
        bn=bn,
        recalibration=recalibration_set(config, data) if bn == "recalibrate" else None,
        process=process,
        dtype=COMPUTE_DTYPES[config.precision or default_precision(process.device)],
        memory_budget_mib=config.evaluation.memory_mib,
        store=run.evaluations,
        progress=process.is_main,
    )


def recalibration_set(config: RunConfig, data: Dataset) -> EvaluationSet:
    """Training images, seeded, seen through the evaluation transform; each batch of them has images of all classes."""
    count = min(config.evaluation.recalibration_images, len(data.train))
    indices = random.Random(config.seed).sample(range(len(data.train)), count)
    return evaluation_set(data.train.subset(indices), config.data)


def _scored_at(run: RunDir, config: RunConfig, step: int) -> Path:
    """The checkpoint whose weights a shrink step scored."""
    epochs = config.shrink.step_epochs
    if not 1 <= step <= len(epochs):
        raise UserError(f"shrink step {step} of {run.path}; its configuration has steps 1 to {len(epochs)}")
    manifest = Manifest(progress=Progress(epoch=epochs[step - 1], shrink_steps=step - 1))
    file = run.checkpoints / f"{manifest.name}.pt"
    if not file.is_file():
        raise UserError(f"{file} is not there; the run has not come to shrink step {step} yet, or it was removed")
    return file
