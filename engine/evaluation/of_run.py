"""A run whose supernet is trained: its weights, its data and the evaluator that searches score with."""

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
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.training.optimization import default_precision
from bsnas.engine.training.supernet import COMPUTE_DTYPES, recalibration_set


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
        bn = bn or self.config.shrink.bn
        precision = self.config.precision or default_precision(self.process)
        return Evaluator(
            self.supernet,
            self.search_val,
            bn=bn,
            recalibration=recalibration_set(self.config, self.data) if bn == "recalibrate" else None,
            process=self.process,
            dtype=COMPUTE_DTYPES[precision],
            memory_budget_mib=self.config.evaluation.memory_mib,
            store=self.run.evaluations,
            progress=self.process.is_main,
        )


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
