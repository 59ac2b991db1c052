"""Search the best released network inside a budget, by evolution over one-shot accuracy.

python search/evolve.py --run runs/digits --max-macs 2M
python search/evolve.py --run runs/digits --max-latency-ms 0.9 --max-params 200K
python search/evolve.py --run runs/digits --objectives top1,macs,latency
python search/evolve.py --run runs/imagenet --budgets 200M,300M,465M,613M
deepspeed search/evolve.py --run runs/imagenet --max-macs 465M

The defaults are the paper's. A second call with the same arguments continues or returns what is stored. With other
limits every evaluation that the run directory knows is taken from there, and what earlier searches found inside the
limits counts too. Latencies come from a table of search/latency.py; the last few networks are timed beside it.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.cli import parse, write_figures
from engine.distributed import on_main, start_process
from engine.errors import UserError, run
from engine.evaluate import BatchNormMode, weights_fingerprint
from engine.journal import recorded
from engine.rundir import RunDir
from engine.space import Space
from engine.trained_run import TrainedRun
from search.constraints import Constraints, Limit, format_count, parse_count
from search.costs import OBJECTIVES, constraints_for, cost_names, cost_ranges
from search.evolution import Candidate, Evaluate, EvolutionConfig, Generation, evolve, ranked
from search.finalists import LatencyTable, fastest_inside, measured_ms
from search.history import History, accuracy_front
from search.latency_bench import LatencyBench
from search.latency_model import find_model
from search.nsga2 import evolve_front, hypervolume, pareto_front
from search.reporter import Reporter, print_finalists, print_result
from search.sampler import Sampler


@dataclass(frozen=True, kw_only=True)
class EvolveArguments:
    run: Path
    """Run directory with a trained supernet."""
    max_macs: str | None = None
    """Most multiply-adds of the released network for one image, as 465M or 0.4G."""
    min_macs: str | None = None
    """Least multiply-adds."""
    max_params: str | None = None
    """Most trained parameters of the released network, as 5M."""
    max_latency_ms: float | None = None
    """Most milliseconds of a batch, by a latency table of search/latency.py."""
    max_activation_bytes: str | None = None
    """Most bytes of activations at once, for one image in fp32, as 4M."""
    objectives: tuple[str, ...] = ("top1",)
    """`top1` alone is the paper's search. With macs, params, memory or latency, NSGA-II finds the Pareto set."""
    budgets: tuple[str, ...] = ()
    """Several limits on MACs, as 200M,300M, in place of --max-macs: a search for each, all evaluations shared."""
    latency_table: Path | None = None
    """Latency table to use; by default the run's own, latency/model-*.json."""
    latency_backend: str | None = None
    """Take the table of this backend; other tables are refused."""
    latency_batch: int | None = None
    """Take the table of this batch size; other tables are refused."""
    latency_precision: str | None = None
    """Take the table of this precision; other tables are refused."""
    foreign_table: bool = False
    """Search for another device than this one: accept its table, and time nothing here."""
    finalists: int = 5
    """Networks whose latency is measured at the end, where a latency table is used; 0 measures none."""
    population: int = 75
    """Architectures in a generation: a third by crossover, a third by mutation, the rest random."""
    iterations: int = 20
    """Generations after the first, random one."""
    seed: int = 0
    """Seed of everything random in the search."""
    bn: BatchNormMode | None = None
    """Statistics of scored subnets; by default as in the run's shrink steps."""
    json: Path | None = None
    """File for the figures of this search."""

    def __post_init__(self) -> None:
        goals = self.goals
        if goals[:1] != ("top1",) or len(set(goals)) < len(goals) or not set(goals) <= {"top1", *OBJECTIVES}:
            raise UserError(f"objectives {','.join(goals)}: give top1 first, then any of {', '.join(OBJECTIVES)}, once")
        if self.budgets and (self.max_macs or len(goals) > 1):
            raise UserError("--budgets sets the limit on MACs of single-objective searches; leave out the other option")
        if self.max_latency_ms is not None and not self.max_latency_ms > 0:
            raise UserError(f"latency limit {self.max_latency_ms} ms; it must be above 0")
        if not 0 <= self.finalists <= LatencyBench.group:
            raise UserError(f"finalists {self.finalists}; allowed are 0 to {LatencyBench.group}")

    @property
    def goals(self) -> tuple[str, ...]:
        """The objectives, written with spaces or commas."""
        return tuple(",".join(self.objectives).split(","))

    @property
    def all_budgets(self) -> tuple[str, ...]:
        """The budgets, written with spaces or commas."""
        return tuple(budget for text in self.budgets for budget in text.split(","))

    def limits(self, budget: str | None = None) -> tuple[Limit, ...]:
        """The limits; `budget` stands for the upper one on MACs."""
        limits = []
        max_macs = budget or self.max_macs
        if max_macs or self.min_macs:
            low = parse_count(self.min_macs) if self.min_macs else 0
            limits.append(Limit("macs", low, parse_count(max_macs) if max_macs else float("inf")))
        if self.max_params:
            limits.append(Limit("params", high=parse_count(self.max_params)))
        if self.max_latency_ms is not None:
            limits.append(Limit("latency_ms", high=self.max_latency_ms))
        if self.max_activation_bytes:
            limits.append(Limit("activation_bytes", high=parse_count(self.max_activation_bytes)))
        return tuple(limits)

    def evolution(self) -> EvolutionConfig:
        return EvolutionConfig.scaled(population=self.population, iterations=self.iterations, seed=self.seed)

    def table(self, run_dir: RunDir, space: Space) -> LatencyTable | None:
        """The latency table, if one is needed. Raises `UserError` when there is none or it is of something else."""
        wanted = {
            "backend": self.latency_backend,
            "batch": self.latency_batch,
            "precision": self.latency_precision,
        }
        asked = self.latency_table is not None or any(value is not None for value in wanted.values())
        if self.max_latency_ms is None and "latency" not in self.goals and not asked:
            return None
        file, model = find_model(run_dir.latency, self.latency_table, wanted)
        return LatencyTable.of(file, model, space, foreign=self.foreign_table)


def main() -> None:
    arguments = parse(EvolveArguments, __doc__, sys.argv[1:])
    requested = [arguments.limits(budget) for budget in arguments.all_budgets or (None,)]
    config = arguments.evolution()
    process = start_process()
    trained = TrainedRun.open(arguments.run, process)
    table = arguments.table(trained.run, trained.supernet.space)
    locked = trained.run.lock() if process.is_main else nullcontext()
    with locked, recorded(trained.run, "evolve", device=process.device):
        results = [
            search(
                trained,
                limits,
                config,
                arguments.bn,
                objectives=arguments.goals,
                table=table,
                finalists=arguments.finalists,
            )
            for limits in requested
        ]
        if process.is_main:
            figures = results[-1]
            if arguments.all_budgets:
                figures = {**figures, "budgets": results}
                print_budgets(arguments.all_budgets, results)
            write_figures(arguments.json, figures)


def search(
    trained: TrainedRun,
    limits: tuple[Limit, ...],
    config: EvolutionConfig,
    bn: BatchNormMode | None,
    *,
    objectives: tuple[str, ...] = ("top1",),
    table: LatencyTable | None = None,
    finalists: int = 5,
) -> dict[str, Any]:
    """Run or continue one search; the main process stores and shows it. Returns the figures of --json."""
    process, space = trained.process, trained.supernet.space
    constraints = constraints_for(space, limits, table.predict if table else None)
    # The sampler comes before the evaluator reads images: limits that nothing keeps end at once.
    Sampler(space, constraints)
    evaluator = trained.evaluator(bn)
    scored_by = {
        "weights": weights_fingerprint(trained.supernet),
        "images": trained.search_val.fingerprint,
        "bn": evaluator.bn,
    }
    costs = cost_names(objectives)
    history = History.of(trained.run.search, space, constraints, config, scored_by, _more(objectives, table))
    generations = on_main(process, history.load)
    others = [_told_by(constraints, candidate) for candidate in on_main(process, history.comparable)]
    known = {candidate.arch for generation in (*generations, others) for candidate in generation}
    front_of = partial(pareto_front, costs=costs) if costs else accuracy_front
    reporter = Reporter(config.iterations, front_of, enabled=process.is_main)
    for generation in _generations(space, constraints, evaluator.evaluate, config, costs, generations):
        generations.append(generation)
        on_main(process, lambda: history.save(generations))
        reporter.show(generations)
    found = [candidate for generation in generations for candidate in generation]
    inside = ranked([found, [candidate for candidate in others if constraints.allow(candidate.arch)]])
    front = front_of(inside if costs else [*found, *others])
    figures: dict[str, Any] = {
        "evaluations": len(found),
        "reused": sum(candidate.arch in known for candidate in found),
        "limits": history.request["limits"],
        "objectives": list(objectives),
        "pareto": len(front),
        "file": str(history.file),
    }
    if costs:
        figures["hypervolume"] = hypervolume(front, costs, cost_ranges(space, constraints, costs))
    if process.is_main:
        print_result(inside[0], front, history.file)
    best = inside[0]
    if table is not None and table.local and finalists:
        chosen = _spread(front, finalists) if costs else inside[:finalists]
        best, measured = on_main(process, lambda: _measure(table, space, chosen, limits, best))
        figures["finalists"] = measured
    on_main(process, lambda: history.publish(best, front))
    return {"best": {"arch": str(best.arch), **best.costs, "top1": best.top1}, **figures}


def _more(objectives: tuple[str, ...], table: LatencyTable | None) -> dict[str, Any]:
    """What a request says beside limits and evolution; nothing for the paper's search."""
    more: dict[str, Any] = {}
    if len(objectives) > 1:
        more["objectives"] = list(objectives)
    if table is not None:
        costs = {name: part.ms for name, part in table.model.parts.items()}
        content = json.dumps([asdict(table.model.context), table.model.offset_ms, costs], sort_keys=True)
        more["latency"] = {
            "backend": table.model.context.backend,
            "batch": table.model.context.batch,
            "precision": table.model.context.precision,
            "table": hashlib.sha256(content.encode()).hexdigest()[:16],
        }
    return more


def _told_by(constraints: Constraints, candidate: Candidate) -> Candidate:
    """A candidate of another search with the costs that this search tells."""
    return replace(candidate, costs={name: cost(candidate.arch) for name, cost in constraints.costs.items()})


def _generations(
    space: Space,
    constraints: Constraints,
    evaluate: Evaluate,
    config: EvolutionConfig,
    costs: Sequence[str],
    done: Sequence[Generation],
) -> Iterator[Generation]:
    if costs:
        return evolve_front(space, constraints, evaluate, config, costs, done)
    return evolve(space, constraints, evaluate, config, done)


def _spread(front: Sequence[Candidate], count: int) -> list[Candidate]:
    """Evenly spaced members of a Pareto set, its ends among them."""
    steps = range(min(count, len(front)))
    return [front[round(k * (len(front) - 1) / max(1, len(steps) - 1))] for k in steps]


def _measure(
    table: LatencyTable, space: Space, finalists: Sequence[Candidate], limits: Sequence[Limit], best: Candidate
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Time the finalists and show them. The best whose measured latency keeps the limit takes the place of `best`."""
    measured = measured_ms(table, space, [candidate.arch for candidate in finalists])
    limit = next((limit.high for limit in limits if limit.cost == "latency_ms"), None)
    print_finalists(finalists, measured, limit)
    rows = [
        {"arch": str(c.arch), "top1": c.top1, "predicted_ms": c.costs["latency_ms"], "measured_ms": ms}
        for c, ms in zip(finalists, measured, strict=True)
    ]
    if limit is not None:
        inside = fastest_inside(finalists, measured, limit)
        if inside is None:
            print(f"none of the {len(finalists)} measured networks keeps the limit; measure the table again")
        elif finalists[inside] != best:
            best = finalists[inside]
            print(f"taken: {best.arch}, the best one that keeps the limit as measured")
    return best, rows


def print_budgets(budgets: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'budget':>10} {'top-1':>8} {'MACs':>10} {'new':>6}  best architecture of each budget")
    for budget, result in zip(budgets, results, strict=True):
        best, new = result["best"], result["evaluations"] - result["reused"]
        print(f"{budget:>10} {best['top1']:8.4f} {format_count(best['macs']):>10} {new:>6}  {best['arch']}")


if __name__ == "__main__":
    run(main)
