"""Does a search under measured latency beat one under MACs, and NSGA-II one search per budget?

python search/latency.py --run runs/digits --batch 8
python benchmarks/search_quality.py --run runs/digits --json quality.json

Needs a trained run with a latency table of this machine, whose space shrinking has left large enough to search.
Evaluations are taken from the run's store where it has them.

1. For several latency limits: a search under the limit, its winner timed, against searches under MACs limits, of each
   the best network, timed too, that keeps the same latency limit. The MACs limits are spread over what random networks
   of nearly the latency limit have. Each of these searches has as many evaluations as the one under latency; and then
   they share as many among them, and the best that all of them find counts: what a user would do who has no latency
   table, and does not know which MACs limit belongs to a latency. A third figure compares with the one MACs limit that
   is best at a latency, as the other seeds tell.
2. The hypervolume (top-1 from 0 to 1, MACs over the range of the space) of one NSGA-II search, against that of
   single-objective searches under evenly spaced MACs budgets which share as many evaluations, over several seeds.
"""

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import numpy as np

from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limited_sampling import Sampler
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig, ranked
from bsnas.search.algorithms.nsga2 import hypervolume, pareto_front
from bsnas.search.latency_tables.model import find_model
from bsnas.search.runs.finalists import NOISE, LatencyTable, measured_ms
from bsnas.search.runs.search import Evaluate, generations


@dataclass(frozen=True, kw_only=True)
class QualityArguments:
    run: Path
    """Run directory with a trained supernet and a latency table."""
    latency_table: Path | None = None
    """Latency table; by default the run's only one."""
    limits: tuple[float, ...] = (0.125, 0.25, 0.5)
    """Latency limits, each as a share of the way from the fastest to the slowest network of the space."""
    budgets: int = 5
    """MACs limits of the searches to compare with."""
    population: int = 50
    """Architectures in a generation, a multiple of the number of budgets."""
    iterations: int = 9
    """Generations after the first."""
    finalists: int = 5
    """Networks of each search that are timed."""
    seeds: int = 3
    """Searches of each kind in both comparisons."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.budgets < 2 or self.population < 3 * self.budgets or self.population % self.budgets:
            raise UserError(f"population {self.population}: give a multiple of the {self.budgets} budgets, at least 3x")
        if not all(0 < share <= 1 for share in self.limits) or min(self.finalists, self.seeds) < 1:
            raise UserError(
                f"limits {self.limits}, finalists {self.finalists}, seeds {self.seeds}: "
                "limits are above 0 and at most 1, the others at least 1"
            )

    def config(self, seed: int, searches: int = 1) -> EvolutionConfig:
        """One of several searches that share the evaluations."""
        return EvolutionConfig.scaled(population=self.population // searches, iterations=self.iterations, seed=seed)


def main() -> None:
    arguments = parse(QualityArguments, __doc__, sys.argv[1:])
    process = start_process()
    trained = TrainedRun.open(arguments.run, process)
    file, model = find_model(trained.run, arguments.latency_table, {})
    table = LatencyTable.of(file, model, trained.supernet.space, foreign=False)
    with trained.run.lock():
        evaluate = trained.evaluator().evaluate
        space = trained.supernet.space
        figures = {
            "equal_latency": (rows := equal_latencies(space, evaluate, table, arguments)),
            "accuracy_under_latency_against_macs": won(rows),
            "against_macs_searches_that_share_evaluations": against_shared(rows),
            "against_the_best_macs_limit": against_best_limit(rows),
            "hypervolume": hypervolumes(space, evaluate, arguments),
            "architectures": space.num_architectures,
            "latency_context": asdict(model.context),
            **provenance(),
        }
    write_figures(arguments.json, figures)


def equal_latencies(
    space: Space, evaluate: Evaluate, table: LatencyTable, arguments: QualityArguments
) -> list[dict[str, Any]]:
    """For every limit and seed, the winner under it, and those of searches under MACs limits that are as fast.

    `searches` says how many share the evaluations of one.
    """
    low, high = table.cost.range()
    rows = []
    for share, seed in product(arguments.limits, range(arguments.seeds)):
        limit = Limit("latency_ms", high=low + share * (high - low))
        macs = [Limit("macs", high=value) for value in macs_of(space, table, limit, arguments.budgets)]
        for tried, searches in [(limit, 1), *product(macs, (1, arguments.budgets))]:
            found = best_found(space, evaluate, table, tried, arguments.config(seed, searches))
            winner = _fastest_enough(space, table, found, limit.high, arguments.finalists)
            row = {"limit_ms": limit.high, "seed": seed, "searched": str(tried), "searches": searches}
            rows.append({**row, "evaluations": len(found), **(winner or {"why": _NONE})})
            print(
                f"at {limit.high:.4f} ms, seed {seed}, search for {tried}, {len(found)} evaluations: "
                + (f"top-1 {winner['top1']:.4f}, {winner['measured_ms']:.4f} ms measured" if winner else _NONE)
            )
    return rows


def won(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """In how many comparisons of equal evaluations the search under latency is more, as, and less accurate."""
    counts = {"more": 0, "as": 0, "less": 0}
    best = {(row["limit_ms"], row["seed"]): row.get("top1", 0.0) for row in rows if "latency" in row["searched"]}
    for row in rows:
        if "latency" not in row["searched"] and row["searches"] == 1:
            ours, theirs = best[row["limit_ms"], row["seed"]], row.get("top1", 0.0)
            counts["more" if ours > theirs else "as" if ours == theirs else "less"] += 1
    return counts


def against_shared(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """How often the search under latency is more, as, and less accurate than the best of those under MACs limits that
    share as many evaluations, and by how much, with the mean's standard error over limits and seeds."""
    differences = []
    for row in rows:
        if "latency" in row["searched"]:
            same = [r for r in rows if (r["limit_ms"], r["seed"]) == (row["limit_ms"], row["seed"])]
            shared = [r.get("top1", 0.0) for r in same if "latency" not in r["searched"] and r["searches"] > 1]
            differences.append(row.get("top1", 0.0) - max(shared))
    return summary(differences)


def against_best_limit(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The search under latency against one under the MACs limit that is best at its latency, with as many evaluations:
    how `against_shared` says it, for every latency and over all.

    Which MACs limit is best is judged by the searches with the other seeds, the lowest of equal ones; None with one
    seed. Judged by the same ones, the best of five would count its luck as accuracy.
    """
    if len({row["seed"] for row in rows}) < 2:
        return None
    differences: dict[str, list[float]] = {}
    for limit in sorted({row["limit_ms"] for row in rows}):
        at = [row for row in rows if row["limit_ms"] == limit and row["searches"] == 1]
        top1 = {(row["searched"], row["seed"]): row.get("top1", 0.0) for row in at}
        under_latency = next(row["searched"] for row in at if "latency" in row["searched"])
        under_macs = [
            searched for searched in dict.fromkeys(row["searched"] for row in at) if searched != under_latency
        ]
        seeds = sorted({seed for _, seed in top1})
        for seed in seeds:
            others = [other for other in seeds if other != seed]
            best = max(under_macs, key=lambda searched: sum(top1[searched, s] for s in others))
            differences.setdefault(f"{limit:.4f} ms", []).append(top1[under_latency, seed] - top1[best, seed])
    return {name: summary(found) for name, found in differences.items()} | {
        "all": summary([d for found in differences.values() for d in found])
    }


def summary(differences: Sequence[float]) -> dict[str, float | None]:
    """How many are above, at and below zero, their mean and its standard error; None for that of one."""
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    signs = {
        "more": sum(d > 0 for d in differences),
        "as": sum(d == 0 for d in differences),
        "less": sum(d < 0 for d in differences),
    }
    return {**signs, "mean": statistics.mean(differences), "standard_error": spread}


_NONE = "nothing is fast enough"


def macs_of(space: Space, table: LatencyTable, limit: Limit, count: int) -> list[float]:
    """MACs limits evenly spaced over random networks that take 90 to 100 % of a latency limit."""
    near = Problem.of(space, (replace(limit, low=0.9 * limit.high),), latency=table.cost)
    sampler, rng = Sampler(near), random.Random(0)
    macs = [near.costs["macs"](sampler.draw(rng)) for _ in range(200)]
    return [float(value) for value in np.linspace(min(macs), max(macs), count)]


def best_found(
    space: Space, evaluate: Evaluate, table: LatencyTable, limit: Limit, config: EvolutionConfig
) -> list[Candidate]:
    """All candidates of a search under one limit, the best first."""
    problem = Problem.of(space, (limit,), latency=table.cost)
    return ranked(candidate for generation in generations(problem, config, evaluate) for candidate in generation)


def _fastest_enough(
    space: Space, table: LatencyTable, found: Sequence[Candidate], limit: float, most: int
) -> dict[str, Any] | None:
    """The best of the candidates whose timed latency keeps the limit. Those predicted beyond it are not timed."""
    near = ranked(c for c in found if c.costs["latency_ms"] <= limit * (1 + 2 * NOISE))
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
    low, high = CostModel(space).macs.range()
    return [float(value) for value in np.linspace(low, high, count + 1)[1:]]


def hypervolumes(space: Space, evaluate: Evaluate, arguments: QualityArguments) -> dict[str, Any]:
    """Hypervolume of both ways for every seed, and how many architectures each evaluated."""
    front = Problem.of(space, objectives=("top1", "macs"))
    costs, ranges = front.minimised, {"macs": front.costs["macs"].range()}
    rows = []
    for seed in range(arguments.seeds):
        whole = generations(front, arguments.config(seed), evaluate)
        parts = [
            candidate
            for budget in macs_budgets(space, arguments.budgets)
            for generation in generations(
                Problem.of(space, (Limit("macs", high=budget),)), arguments.config(seed, arguments.budgets), evaluate
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
