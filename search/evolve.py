"""Search the best released network inside a budget, by evolution over one-shot accuracy.

python search/evolve.py --run runs/digits --max-macs 2M
python search/evolve.py --run runs/digits --max-latency-ms 0.9 --max-params 200K
python search/evolve.py --run runs/digits --objectives top1,macs,latency
python search/evolve.py --run runs/imagenet --budgets 200M,300M,465M,613M
python search/evolve.py --run runs/digits --max-macs 2M --correction
deepspeed search/evolve.py --run runs/imagenet --max-macs 465M

The defaults are the paper's. A second call with the same arguments continues or returns what is stored. With other
limits every evaluation that the run directory knows is taken from there, and what earlier searches found inside the
limits counts too. --correction learns from the networks that search/finals.py has trained. Latencies come from a table
of search/latency.py; the last few networks are timed beside it.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

from bsnas.engine.config import ScoreName
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.limited_sampling import check_limits
from bsnas.engine.space.limits import Limit, parse_count
from bsnas.engine.space.problem import OBJECTIVES, Problem
from bsnas.search.algorithms.evolution import EvolutionConfig
from bsnas.search.latency_tables.model import LatencyModel, find_model

MOST_FINALISTS = 12


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
    min_latency_ms: float | None = None
    """Least milliseconds of a batch: for a network that uses the time that --max-latency-ms allows."""
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
    bn: Literal["running", "recalibrate"] | None = None
    """Statistics of scored subnets; by default as in the run's shrink steps."""
    score: ScoreName | None = None
    """What ranks subnets, top-1 or the mean loss; by default as in the run's shrink steps."""
    correction: bool = False
    """Learn from the networks that search/finals.py has trained how one-shot scores err: the last third of the
    generations and the ranking for the next finals go by it."""
    confidence: float | None = None
    """Stop scoring a subnet that is no parent at this confidence, as 0.999; by default all images are seen."""
    kernels: str | None = None
    """Kernel backend to force: reference, triton or onednn."""
    timeout_minutes: float = 30
    """Minutes that a process waits for the others before it gives them up."""
    json: Path | None = None
    """File for the figures of this search."""

    def __post_init__(self) -> None:
        goals = self.goals
        if goals[:1] != ("top1",) or len(set(goals)) < len(goals) or not set(goals) <= {"top1", *OBJECTIVES}:
            raise UserError(f"objectives {','.join(goals)}: give top1 first, then any of {', '.join(OBJECTIVES)}, once")
        if self.budgets and (self.max_macs or len(goals) > 1):
            raise UserError("--budgets sets the limit on MACs of single-objective searches; leave out the other option")
        if self.confidence is not None and len(goals) > 1:
            raise UserError("--confidence is for the search of the best top1; a Pareto set needs the scores of all")
        for latency in (self.max_latency_ms, self.min_latency_ms):
            if latency is not None and not 0 < latency < float("inf"):
                raise UserError(f"latency limit {latency} ms; it must be above 0, and finite")
        if not 0 < self.timeout_minutes < float("inf"):
            raise UserError(f"timeout {self.timeout_minutes} minutes; it must be above 0")
        if not 0 <= self.finalists <= MOST_FINALISTS:
            raise UserError(f"finalists {self.finalists}; allowed are 0 to {MOST_FINALISTS}")

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
        if self.max_latency_ms or self.min_latency_ms:
            limits.append(Limit("latency_ms", self.min_latency_ms or 0, self.max_latency_ms or float("inf")))
        if self.max_activation_bytes:
            limits.append(Limit("activation_bytes", high=parse_count(self.max_activation_bytes)))
        return tuple(limits)

    def evolution(self) -> EvolutionConfig:
        return EvolutionConfig.scaled(population=self.population, iterations=self.iterations, seed=self.seed)

    def find_table(self) -> tuple[Path, LatencyModel] | None:
        """The latency table, if one is needed. Raises `UserError` when there is none or it is of something else."""
        wanted = {
            "backend": self.latency_backend,
            "batch": self.latency_batch,
            "precision": self.latency_precision,
        }
        asked = self.latency_table is not None or any(value is not None for value in wanted.values())
        limited = self.max_latency_ms or self.min_latency_ms
        if not limited and "latency" not in self.goals and not asked:
            return None
        return find_model(RunDir(self.run), self.latency_table, wanted)


def main() -> None:
    arguments = parse(EvolveArguments, __doc__, sys.argv[1:])
    requested = [arguments.limits(budget) for budget in arguments.all_budgets or (None,)]
    config = arguments.evolution()
    found = arguments.find_table()
    refuse_unreachable(RunDir(arguments.run), requested, found[1] if found else None)

    # Torch and DeepSpeed take seconds to load: only for what can be searched.
    from bsnas.engine.evaluation.trained_run import TrainedRun
    from bsnas.engine.host.distributed import entered_by_main, start_process
    from bsnas.engine.runs.commands import recorded
    from bsnas.search.reporting.tensorboard import write_search_events
    from bsnas.search.runs.finalists import LatencyTable
    from bsnas.search.runs.printing import print_budgets
    from bsnas.search.runs.search_run import search_run

    process = start_process(arguments.timeout_minutes, arguments.kernels)
    trained = TrainedRun.open(arguments.run, process)
    space = trained.supernet.space
    table = LatencyTable.of(*found, space, foreign=arguments.foreign_table) if found else None
    with entered_by_main(process, trained.run.lock()), recorded(trained.run, "evolve", device=process.device):
        results = [
            search_run(
                trained,
                limits,
                config,
                arguments.bn,
                objectives=arguments.goals,
                table=table,
                finalists=arguments.finalists,
                confidence=arguments.confidence,
                score=arguments.score,
                corrected=arguments.correction,
            )
            for limits in requested
        ]
    if process.is_main:
        write_search_events(RunFacts(trained.run.path))
        figures = results[-1]
        if arguments.all_budgets:
            figures = {**figures, "budgets": results}
            print_budgets(arguments.all_budgets, results)
        write_figures(arguments.json, figures)


def refuse_unreachable(run_dir: RunDir, requested: Sequence[tuple[Limit, ...]], model: LatencyModel | None) -> None:
    """Raise `UserError` for limits that no architecture keeps, before anything slow begins.

    A run that cannot be read is left to those who say what is wrong with it.
    """
    try:
        space = run_dir.spaces()[-1]
    except UserError:
        return
    for limits in requested:
        check_limits(Problem.of(space, limits, latency=model.cost(space) if model else None))


if __name__ == "__main__":
    run(main)
