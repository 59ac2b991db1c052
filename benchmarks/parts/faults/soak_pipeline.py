"""The small digits pipeline that benchmarks/soak.py disturbs: train, evolve, retrain, export; and undisturbed ones."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bsnas.benchmarks.parts.faults.disturbed_runs import Faults, Started, start_ranks

TRAIN = [
    *(
        "--preset",
        "digits",
        "--optimizer.warmup-epochs",
        "1",
        "--shrink.first-epochs",
        "2",
        "--shrink.interval-epochs",
        "1",
    ),
    *("--shrink.keep", "12", "9", "--shrink.models-per-operation", "3", "--safety.checkpoint-minutes", "0.02"),
]
EVOLVE = ["--max-macs", "4M", "--population", "24", "--iterations", "8"]
RETRAIN = ["--epochs", "4", "--safety.checkpoint-minutes", "0.02"]
STEPS_FILE = "BSNAS_SOAK_STEPS"
LONGEST = 600.0
"""Seconds that any process of these runs may take."""


def count_steps() -> None:
    """In a disturbed process: write a byte for every optimizer step that is made."""
    from bsnas.engine.training.optimization import Optimization

    step = Optimization.step
    descriptor = os.open(os.environ[STEPS_FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(self: Any, *arguments: Any) -> Any:
        result = step(self, *arguments)
        os.write(descriptor, b"s")
        return result

    Optimization.step = counted  # type: ignore[method-assign, assignment]


def poison_rank_1() -> None:
    """In a disturbed process: the images of the fifth to seventh batch are no numbers, on one rank of two."""
    from bsnas.engine.data.loading.loader import TrainLoader

    receive = TrainLoader._receive

    def poisoned(self: Any, position: int) -> Any:
        images, labels = receive(self, position)
        return (images * float("nan") if position in (5, 6, 7) else images), labels

    if os.environ["RANK"] == "1":
        TrainLoader._receive = poisoned  # type: ignore[method-assign]


@dataclass
class Report:
    """The counts of a part, and one line for everything that was not as it must be."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def slowest(self, what: str, seconds: float) -> None:
        self.seconds[f"longest {what}"] = max(seconds, self.seconds.get(f"longest {what}", 0))

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.failures.append(what)
            print(f"FAILED: {what}", flush=True)


class Pipelines:
    """A directory with undisturbed runs to compare with, and disturbed ones."""

    def __init__(self, directory: Path, seed: int, gap: float) -> None:
        self.directory = directory
        self.cache = directory / "cache"
        self.random = random.Random(seed)
        self.gap = gap
        """Mean seconds between two disturbances."""

    def commands(self, run: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """Every script of the pipeline with its arguments, which depend on what is there already."""
        where = ["--run", str(run)]
        data = ["--data.cache-dir", str(self.cache)]
        resume = [*where, "--resume", "--safety.checkpoint-minutes", "0.02"]
        yield "engine/train.py", lambda: resume if (run / "config.json").exists() else [*TRAIN, *where, *data]
        yield "search/evolve.py", lambda: [*EVOLVE, *where]
        yield "engine/retrain.py", lambda: [*RETRAIN, *where]
        yield "engine/export.py", lambda: where

    def undisturbed(self, run: Path) -> None:
        """The whole pipeline."""
        for script, arguments in self.commands(run):
            process = self.start(run, script, arguments())
            code = process.ended(LONGEST)
            if code != 0:
                raise RuntimeError(f"undisturbed {script} ended with {code}: {process.said()[-2000:]}")

    def start(self, run: Path, script: str, arguments: list[str], faults: Faults | None = None) -> Started:
        environment = {STEPS_FILE: str(run.with_suffix(".steps"))}
        return Started(
            script, arguments, self.log(run), environment=environment, faults=faults or Faults(patch=count_steps)
        )

    @cached_property
    def reference(self) -> Path:
        """The undisturbed run."""
        began = time.perf_counter()
        run = self.directory / "undisturbed"
        self.undisturbed(run)
        print(f"undisturbed pipeline: {time.perf_counter() - began:.0f} s, {steps(run)} optimizer steps", flush=True)
        return run

    def log(self, run: Path) -> Path:
        return self.directory / "logs" / f"{run.name}.log"

    def train_arguments(self, run: Path) -> list[str]:
        return next(self.commands(run))[1]()

    def two_ranks(self, name: str) -> Path:
        """A training by two ranks to its end."""
        run = self.directory / name
        codes, said = self.ended(start_ranks(2, "engine/train.py", self.train_arguments(run), self.log(run)))
        if codes != [0, 0]:
            raise RuntimeError(f"undisturbed training by two ranks ended with {codes}: {said[-2000:]}")
        return run

    def ended(self, processes: list[Started]) -> tuple[list[int | None], str]:
        codes = [process.ended(LONGEST) for process in processes]
        return codes, "\n".join(process.said() for process in processes)

    def stopped_late(self) -> Path:
        """A training that was told to stop inside its last epoch."""
        run, epochs = self.directory / "stopped", 3
        process = self.start(run, "engine/train.py", self.train_arguments(run))
        while process.ended(0.05) is None:
            found = list(run.glob(f"checkpoints/epoch-{epochs:04d}-pass-*.json"))
            if found:
                process.signal(signal.SIGTERM)
                process.ended(LONGEST)
        return run

    def copy(self, run: Path, name: str) -> Path:
        target = self.directory / name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(run, target)


def steps(run: Path) -> int:
    """Optimizer steps that all processes of a run made."""
    return run.with_suffix(".steps").stat().st_size
