"""Search the best released network inside a budget, by evolution over one-shot accuracy.

python search/evolve.py --run runs/digits --max-macs 2M
deepspeed search/evolve.py --run runs/imagenet --max-macs 465M

The defaults are the paper's. A second call with the same arguments continues or returns what is stored. With other
limits every evaluation that the run directory knows is taken from there, and what earlier searches found inside the
limits counts too.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.cli import parse, write_figures
from engine.cost import CostModel
from engine.distributed import on_main, start_process
from engine.errors import run
from engine.evaluate import BatchNormMode, weights_fingerprint
from engine.journal import recorded
from engine.space import Space
from engine.trained_run import TrainedRun
from search.constraints import Constraints, Limit, format_count, parse_count
from search.evolution import Candidate, EvolutionConfig, Generation, evolve, ranked
from search.history import History, accuracy_front


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

    def limits(self) -> tuple[Limit, ...]:
        limits = []
        if self.max_macs or self.min_macs:
            low = parse_count(self.min_macs) if self.min_macs else 0
            limits.append(Limit("macs", low, parse_count(self.max_macs) if self.max_macs else float("inf")))
        if self.max_params:
            limits.append(Limit("params", high=parse_count(self.max_params)))
        return tuple(limits)

    def evolution(self) -> EvolutionConfig:
        return EvolutionConfig.scaled(population=self.population, iterations=self.iterations, seed=self.seed)


def main() -> None:
    arguments = parse(EvolveArguments, __doc__, sys.argv[1:])
    limits, config = arguments.limits(), arguments.evolution()
    process = start_process()
    trained = TrainedRun.open(arguments.run, process)
    locked = trained.run.lock() if process.is_main else nullcontext()
    with locked, recorded(trained.run, "evolve", device=process.device):
        figures = search(trained, limits, config, arguments.bn)
        if process.is_main:
            write_figures(arguments.json, figures)


def search(
    trained: TrainedRun, limits: tuple[Limit, ...], config: EvolutionConfig, bn: BatchNormMode | None
) -> dict[str, Any]:
    """Run or continue one search; the main process stores and shows it. Returns the figures of --json."""
    process, space = trained.process, trained.supernet.space
    constraints = constraints_for(space, limits)
    evaluator = trained.evaluator(bn)
    scored_by = {
        "weights": weights_fingerprint(trained.supernet),
        "images": trained.search_val.fingerprint,
        "bn": evaluator.bn,
    }
    history = History.of(trained.run.search, space, constraints, config, scored_by)
    generations = on_main(process, history.load)
    others = on_main(process, history.comparable)
    known = {candidate.arch for generation in (*generations, others) for candidate in generation}
    reporter = Reporter(config.iterations, enabled=process.is_main)
    for generation in evolve(space, constraints, evaluator.evaluate, config, generations):
        generations.append(generation)
        on_main(process, lambda: history.save(generations))
        reporter.show(generations)
    found = [candidate for generation in generations for candidate in generation]
    best = ranked([found, [candidate for candidate in others if constraints.allow(candidate.arch)]])[0]
    front = accuracy_front([*found, *others])
    on_main(process, lambda: history.publish(best, front))
    if process.is_main:
        print_result(best, front, history.file)
    return {
        "best": {"arch": str(best.arch), **best.costs, "top1": best.top1},
        "evaluations": len(found),
        "reused": sum(candidate.arch in known for candidate in found),
        "limits": history.request["limits"],
        "file": str(history.file),
    }


def constraints_for(space: Space, limits: tuple[Limit, ...]) -> Constraints:
    """Limits on the costs that need no measurement; both costs are recorded whether limited or not."""
    model = CostModel(space)
    return Constraints(limits, {"macs": model.macs, "params": model.params})


class Reporter:
    """One line per generation: the best so far, the size of the front, evaluations a second, time left."""

    def __init__(self, iterations: int, *, enabled: bool) -> None:
        self._iterations = iterations
        self._enabled = enabled
        self._started = time.perf_counter()
        self._evaluated = 0
        self._shown = 0

    def show(self, generations: Sequence[Generation]) -> None:
        if not self._enabled:
            return
        candidates = ranked(generations)
        best = candidates[0]
        self._evaluated += len(generations[-1])
        self._shown += 1
        seconds = time.perf_counter() - self._started
        left = seconds / self._shown * (self._iterations + 1 - len(generations))
        print(
            f"generation {len(generations) - 1}/{self._iterations}  best top-1 {best.top1:.4f} at "
            f"{format_count(best.costs['macs'])} MACs  front {len(accuracy_front(candidates))}  "
            f"{self._evaluated / seconds:.1f} subnets/s  left {left:.0f} s",
            flush=True,
        )


def print_result(best: Candidate, front: Sequence[Candidate], file: Path) -> None:
    print(f"\n{'top-1':>8} {'MACs':>10} {'params':>10}  accuracy-MACs front")
    for candidate in front:
        macs, params = (format_count(candidate.costs[cost]) for cost in ("macs", "params"))
        print(f"{candidate.top1:8.4f} {macs:>10} {params:>10}  {candidate.arch}")
    print(f"\nbest: {best.arch}")
    print(
        f"one-shot top-1 {best.top1:.4f}, {format_count(best.costs['macs'])} MACs, "
        f"{format_count(best.costs['params'])} parameters; all evaluations are in {file}"
    )


if __name__ == "__main__":
    run(main)
