"""Does a search under measured latency beat one under MACs, and NSGA-II one search per budget?

python search/latency.py --run runs/digits --batch 8
python benchmarks/search_quality.py --run runs/digits --json quality.json

Needs a trained run with a latency table of this machine. Both comparisons give each side the same number of
evaluations; evaluations are taken from the run's store where it has them.

1. A search under a latency limit, its winner timed, against the best network that searches under MACs limits find whose
   timed latency keeps the same limit.
2. The hypervolume (top-1 from 0 to 1, MACs over the range of the space) of one NSGA-II search, against that of
   single-objective searches under evenly spaced MACs budgets, over several seeds.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks.provenance import provenance
from engine.cli import parse, write_figures
from engine.distributed import start_process
from engine.errors import UserError, run
from engine.space import Space
from engine.trained_run import TrainedRun
from search.constraints import Limit
from search.costs import constraints_for, cost_ranges
from search.evolution import Candidate, Evaluate, EvolutionConfig, evolve, ranked
from search.finalists import NOISE, LatencyTable, measured_ms
from search.latency_model import find_model
from search.nsga2 import evolve_front, hypervolume, pareto_front


@dataclass(frozen=True, kw_only=True)
class QualityArguments:
    run: Path
    """Run directory with a trained supernet and a latency table."""
    latency_table: Path | None = None
    """Latency table; by default the run's only one."""
    max_latency_ms: float | None = None
    """The limit; by default an eighth of the way from the fastest to the slowest network of the space."""
    budgets: int = 5
    """MACs budgets of the searches to compare with, evenly spaced over the range of the space."""
    population: int = 50
    """Architectures in a generation, a multiple of the number of budgets."""
    iterations: int = 9
    """Generations after the first."""
    finalists: int = 5
    """Networks of each search that are timed."""
    seeds: int = 3
    """Searches of each kind in the comparison of hypervolumes."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.budgets < 2 or self.population < 3 * self.budgets or self.population % self.budgets:
            raise UserError(f"population {self.population}: give a multiple of the {self.budgets} budgets, at least 3x")

    def config(self, seed: int, searches: int = 1) -> EvolutionConfig:
        """One of several searches that share the evaluations."""
        return EvolutionConfig.scaled(population=self.population // searches, iterations=self.iterations, seed=seed)


def main() -> None:
    arguments = parse(QualityArguments, __doc__, sys.argv[1:])
    process = start_process()
    trained = TrainedRun.open(arguments.run, process)
    file, model = find_model(trained.run.latency, arguments.latency_table, {})
    table = LatencyTable.of(file, model, trained.supernet.space, foreign=False)
    with trained.run.lock():
        evaluate = trained.evaluator().evaluate
        figures = {
            "equal_latency": equal_latency(trained.supernet.space, evaluate, table, arguments),
            "hypervolume": hypervolumes(trained.supernet.space, evaluate, arguments),
            "latency_context": {"device": model.context.device, "batch": model.context.batch},
            **provenance(),
        }
    write_figures(arguments.json, figures)


def equal_latency(space: Space, evaluate: Evaluate, table: LatencyTable, arguments: QualityArguments) -> dict[str, Any]:
    """The winner under a latency limit, and the best network of searches under MACs limits that is as fast."""
    low, high = cost_ranges(space, constraints_for(space, (), table.predict), ("latency_ms",))["latency_ms"]
    limit = arguments.max_latency_ms or low + (high - low) / 8
    by_latency = best_found(space, evaluate, table, Limit("latency_ms", high=limit), arguments.config(0))
    by_macs = [
        candidate
        for budget in macs_budgets(space, arguments.budgets)
        for candidate in best_found(
            space, evaluate, table, Limit("macs", high=budget), arguments.config(0, arguments.budgets)
        )
    ]
    winners = {
        name: _fastest_enough(space, table, found, limit, arguments.finalists)
        for name, found in (("latency", by_latency), ("macs", by_macs))
    }
    for name, winner in winners.items():
        print(f"limit {limit:.4f} ms, search under {name}: {winner or 'nothing is fast enough'}")
    return {"limit_ms": limit, **winners}


def best_found(
    space: Space, evaluate: Evaluate, table: LatencyTable, limit: Limit, config: EvolutionConfig
) -> list[Candidate]:
    """All candidates of a search under one limit, the best first."""
    return ranked(list(evolve(space, constraints_for(space, (limit,), table.predict), evaluate, config)))


def _fastest_enough(
    space: Space, table: LatencyTable, found: Sequence[Candidate], limit: float, most: int
) -> dict[str, Any] | None:
    """The best of the candidates whose timed latency keeps the limit. Those predicted far beyond it are not timed."""
    near = ranked([[c for c in found if c.costs["latency_ms"] <= limit * 1.1]])
    for start in range(0, len(near), most):
        finalists = near[start : start + most]
        for candidate, ms in zip(finalists, measured_ms(table, space, [c.arch for c in finalists]), strict=True):
            if ms <= limit * (1 + NOISE):
                predicted = candidate.costs["latency_ms"]
                row = {"arch": str(candidate.arch), "top1": candidate.top1, "loss": candidate.loss}
                return {**row, "macs": candidate.costs["macs"], "predicted_ms": predicted, "measured_ms": ms}
    return None


def macs_budgets(space: Space, count: int) -> list[float]:
    """Limits evenly spaced over the range of the space; the last one limits nothing."""
    low, high = cost_ranges(space, constraints_for(space, ()), ("macs",))["macs"]
    return [float(value) for value in np.linspace(low, high, count + 1)[1:]]


def hypervolumes(space: Space, evaluate: Evaluate, arguments: QualityArguments) -> dict[str, Any]:
    """Hypervolume of both ways for every seed, and how many architectures each evaluated."""
    costs = ("macs",)
    ranges = cost_ranges(space, constraints_for(space, ()), costs)
    rows = []
    for seed in range(arguments.seeds):
        whole = evolve_front(space, constraints_for(space, ()), evaluate, arguments.config(seed), costs)
        parts = [
            candidate
            for budget in macs_budgets(space, arguments.budgets)
            for generation in evolve(
                space,
                constraints_for(space, (Limit("macs", high=budget),)),
                evaluate,
                arguments.config(seed, arguments.budgets),
            )
            for candidate in generation
        ]
        found = {"nsga2": [c for generation in whole for c in generation], "budgets": parts}
        row: dict[str, Any] = {"seed": seed}
        for name, candidates in found.items():
            row[name] = hypervolume(pareto_front(candidates, costs), costs, ranges)
            row[f"evaluations_{name}"] = len(candidates)
        print(f"seed {seed}: hypervolume {row['nsga2']:.5f} by NSGA-II, {row['budgets']:.5f} by budgets")
        rows.append(row)
    return {"rows": rows, **{name: statistics.mean(row[name] for row in rows) for name in ("nsga2", "budgets")}}


if __name__ == "__main__":
    run(main)
