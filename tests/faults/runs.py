"""The smallest digits pipeline: two epochs with a shrink step between them, evolution, retraining."""

from collections.abc import Sequence
from pathlib import Path

from bsnas.benchmarks.parts.faults.disturbed_runs import Faults, Started
from bsnas.benchmarks.parts.faults.soak_pipeline import STEPS_FILE, count_steps

TRAIN = (
    *("--preset", "digits", "--optimizer.warmup-epochs", "0", "--safety.checkpoint-minutes", "0.001"),
    *("--shrink.first-epochs", "1", "--shrink.interval-epochs", "1", "--shrink.keep", "9"),
    *("--shrink.models-per-operation", "4", "--optimizer.batch-size", "96"),
)
EVOLVE = ("--population", "12", "--iterations", "4")
RETRAIN = ("--epochs", "2", "--safety.checkpoint-minutes", "0.001")
SECONDS = 300.0
"""A process may take so long on a busy machine."""


def start(
    script: str, run: Path, arguments: Sequence[str] = (), *, faults: Faults | None = None, cold: bool = False
) -> Started:
    """A script on a run; its optimizer steps are counted unless something else is wrong with it."""
    log = run.parent / f"{run.name}-{Path(script).stem}.log"
    environment = {STEPS_FILE: str(run.with_suffix(".steps"))}
    faults = faults or Faults(patch=count_steps)
    return Started(script, [*arguments, "--run", str(run)], log, environment=environment, faults=faults, cold=cold)


def training(run: Path, cache: Path) -> list[str]:
    """The arguments that begin or continue a training."""
    if (run / "config.json").exists():
        return ["--resume", "--safety.checkpoint-minutes", "0.001"]
    return [*TRAIN, "--data.cache-dir", str(cache)]


def steps(run: Path) -> int:
    """Optimizer steps that all processes of the run made."""
    return run.with_suffix(".steps").stat().st_size
