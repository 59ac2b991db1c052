"""Do the paper's claims hold on your images? Ablations and baselines in one queue, with a table and plots.

python benchmarks/study.py --preset fashion-mnist --seeds 3 --output runs/study
python benchmarks/study.py --preset digits --cells base shrinking --seeds 1 --output runs/study-digits

Every cell trains a supernet with equally many passes over images, scores random subnets with running and with
recalibrated statistics, ranks a pool of networks that are trained alone, searches it by evolution and retrains what was
found. Baselines are trained under the same limit on MACs. What is done is kept, an interrupted study continues, and
several processes may work on different cells of one study; each writes the tables of what is there.
"""

import random
import statistics
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

from rich.console import Console

from bsnas.benchmarks.parts.study.baselines import BASELINES, Setting
from bsnas.benchmarks.parts.study.cells import CELLS, Cell, StudyPreset, base_config
from bsnas.benchmarks.parts.study.measure import Pool, measure_supernet
from bsnas.benchmarks.parts.study.tables import Results, write_tables
from bsnas.benchmarks.parts.study.trained_alone import TrainedAlone
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.benchmarks.ranking import spread_over
from bsnas.engine.config import RunConfig, SafetyConfig, read_config, to_json
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process, entered_by_main, on_main, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import RunDir, read_json, write_json
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import Limit, parse_count
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.training.supernet import SupernetTraining
from bsnas.search.algorithms.evolution import EvolutionConfig

NAMES = (*(cell.name for cell in CELLS), *BASELINES)


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    output: Path
    """Directory of the study: a run directory per cell and seed, tables and plots."""
    preset: StudyPreset = "fashion-mnist"
    """Images, and the space that is studied on them."""
    cells: tuple[str, ...] = ()
    """Cells and baselines to work on; by default all."""
    seeds: int = 3
    """Seeds 0, 1, ... of every cell."""
    epochs: int | None = None
    """Epochs of a supernet; by default 4 for fashion-mnist, 12 for its wide space and 40 for digits."""
    retrain_epochs: int | None = None
    """Epochs of a network that is trained alone; by default 2, 4 and 20."""
    max_macs: str | None = None
    """Limit on the networks found; by default the median of random architectures."""
    population: int = 30
    """Architectures in a generation of the evolution."""
    iterations: int = 5
    """Generations after the first."""
    archs: int = 20
    """Networks that are trained alone to compare rankings with; 0 leaves that out."""
    pool_seeds: int = 2
    """Seeds that each of them is trained with. How well two seeds agree bounds how well anything else can."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    page: Path | None = None
    """Markdown page whose tables, between marks, are replaced by this study's."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.cells) - set(NAMES))
        if unknown:
            raise UserError(f"cells {', '.join(unknown)} are unknown; allowed are {', '.join(NAMES)}")
        if self.seeds < 1 or (self.epochs or 4) < 4 or (self.retrain_epochs or 1) < 1 or 0 < self.archs < 3:
            raise UserError(
                f"seeds {self.seeds}, epochs {self.epochs}, retrain epochs {self.retrain_epochs}, archs {self.archs}: "
                "need at least 1 seed, 4 epochs, 1 retrain epoch, and 3 archs or 0"
            )
        if self.pool_seeds < 1:
            raise UserError(f"pool seeds {self.pool_seeds}; need at least 1")


def main() -> None:
    arguments = parse(StudyArguments, __doc__, sys.argv[1:])
    process = start_process(arguments.safety.timeout_minutes)
    study = Study(arguments, process)
    study.run()
    if process.is_main:
        figures = {**study.results(), **provenance()}
        write_tables(figures, study.directory, arguments.page)
        write_figures(arguments.json, figures)


@dataclass(frozen=True)
class Study:
    """The queue, and where the results of its parts lie."""

    arguments: StudyArguments
    process: Process

    @property
    def directory(self) -> Path:
        return self.arguments.output.expanduser()

    def run(self) -> None:
        """Whatever is still to do, seed by seed, so that a study cut short has complete comparisons."""
        on_main(self.process, self._claim)
        chosen = self.arguments.cells or NAMES
        for seed in range(self.arguments.seeds):
            for cell in CELLS:
                if cell.name in chosen:
                    self.do(cell.name, seed, lambda cell=cell, seed=seed: self._cell(cell, seed))
            for name, (_, baseline) in BASELINES.items():
                if name in chosen:
                    self.do(name, seed, lambda baseline=baseline, seed=seed: baseline(self._setting(seed)))

    def do(self, name: str, seed: int, work: Any) -> None:
        """One part, unless its result is there."""
        file = self._result(name, seed)
        if on_main(self.process, file.is_file):
            return
        if self.process.is_main:
            Console(stderr=True).rule(f"{name}, seed {seed}")
        figures = work()
        on_main(self.process, lambda: write_json(file, figures))

    def results(self) -> Results:
        """Everything that is there, of this process and of others."""
        found = {name: [self._result(name, seed) for seed in range(self.arguments.seeds)] for name in NAMES}
        parts = {name: {n: read_json(f) for n, f in enumerate(files) if f.is_file()} for name, files in found.items()}
        return {
            "request": self.request,
            "cells": {cell.name: {"about": cell.about, "seeds": parts[cell.name]} for cell in CELLS},
            "baselines": {name: {"about": about, "seeds": parts[name]} for name, (about, _) in BASELINES.items()},
        }

    # ---- what is the same for all

    @cached_property
    def base(self) -> RunConfig:
        arguments = self.arguments
        config = base_config(arguments.preset, arguments.epochs, arguments.retrain_epochs)
        classes = len(on_main(self.process, lambda: open_dataset(config.data)).classes)
        return replace(config, space=replace(config.space, classes=classes))

    @cached_property
    def max_macs(self) -> int:
        if self.arguments.max_macs is not None:
            return int(parse_count(self.arguments.max_macs))
        rng, macs = random.Random(0), CostModel(self.base.space).macs_and_params
        return int(statistics.median(macs(uniform_arch(self.base.space, rng))[0] for _ in range(1000)))

    @cached_property
    def request(self) -> dict[str, Any]:
        """What all results of a study have in common."""
        return {
            "max_macs": self.max_macs,
            "evolution": asdict(self._evolution(0)),
            "archs": self.arguments.archs,
            "pool_seeds": self.arguments.pool_seeds,
            "base": to_json(self.base),
        }

    def _evolution(self, seed: int) -> EvolutionConfig:
        return EvolutionConfig.scaled(
            population=self.arguments.population, iterations=self.arguments.iterations, seed=seed
        )

    def _claim(self) -> None:
        """Record the request. Raises `UserError` when the directory holds a study with another one."""
        file = self.directory / "study.json"
        if file.is_file():
            held = read_json(file)
            if "base" in held:
                held["base"] = to_json(read_config(held["base"], file))
            for name, value in self.request.items():
                if held.get(name) != value:
                    raise UserError(
                        f"{file.parent} holds a study with another {name}; give the same options, or another --output"
                    )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, self.request)

    # ---- parts

    def _path(self, name: str, seed: int) -> Path:
        return self.directory / name / f"seed-{seed}"

    def _result(self, name: str, seed: int) -> Path:
        return self.directory / "results" / f"{name}-{seed}.json"

    def _cell(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Train a cell's supernet, or what is left to train, and measure it."""
        config = cell.config(self.base, seed)
        path = self._path(cell.name, seed)
        run_dir = on_main(self.process, lambda: _open(path, config))
        with entered_by_main(self.process, run_dir.lock()), recorded(run_dir, "study", device=self.process.device):
            data = on_main(self.process, lambda: open_dataset(config.data, run_dir.split_file))
            SupernetTraining(config, run_dir, self.process, data, {}, self.arguments.safety).train()
            trained = TrainedRun.open(path, self.process)
            limit = Limit("macs", high=self.max_macs)
            return measure_supernet(trained, limit, self._evolution(seed), self._alone(trained), self._pool())

    def _setting(self, seed: int) -> Setting:
        trained = self._trained_base(seed)
        evolution = self._evolution(seed)
        evaluations = evolution.population * (evolution.iterations + 1)
        return Setting(trained, self._alone(trained), self.max_macs, evaluations)

    def _trained_base(self, seed: int) -> TrainedRun:
        path = self._path("base", seed)
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is not there, which this part needs; add base to --cells")
        return TrainedRun.open(path, self.process)

    def _alone(self, trained: TrainedRun, seed: int | None = None) -> TrainedAlone:
        config = trained.config if seed is None else replace(trained.config, seed=seed)
        return TrainedAlone(self.directory / "alone", config, self.process, trained.data, self.arguments.safety)

    def _pool(self) -> Pool:
        """Architectures spread over one-shot accuracy and MACs, each with its test top-1 when trained alone."""
        if not self.arguments.archs:
            return Pool((), (), ())
        trained = self._trained_base(0)
        space, rng = self.base.space, random.Random("pool")
        candidates = list(dict.fromkeys(uniform_arch(space, rng) for _ in range(10 * self.arguments.archs)))
        top1 = [score.top1 for score in trained.evaluator().evaluate(candidates)]
        archs = spread_over(space, candidates, top1, self.arguments.archs)
        seeds = [self._alone(trained, seed) for seed in range(self.arguments.pool_seeds)]
        macs = CostModel(space).macs_and_params
        return Pool(
            tuple(archs), tuple(macs(arch)[0] for arch in archs), tuple(alone.all_top1(space, archs) for alone in seeds)
        )


def _open(path: Path, config: RunConfig) -> RunDir:
    if not (path / "config.json").is_file():
        return RunDir.create(path, config)
    run_dir = RunDir.open(path)
    if run_dir.config() != config:
        raise UserError(f"{path} holds a run with another configuration; give another --output")
    return run_dir


if __name__ == "__main__":
    run(main)
