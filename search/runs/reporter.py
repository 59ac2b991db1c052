"""What a search tells its user: a line per generation, and what it found."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bsnas.search.algorithms.evolution import Candidate, Generation, ranked
from bsnas.search.costs.constraints import Limit, format_cost, format_count
from bsnas.search.runs.history import accuracy_front

Front = Callable[[Sequence[Candidate]], list[Candidate]]
"""The Pareto set of candidates."""


class Reporter:
    """One line per generation: the best so far, the size of the front, evaluations a second, time left."""

    def __init__(self, iterations: int, front: Front = accuracy_front, *, enabled: bool) -> None:
        self._iterations = iterations
        self._front = front
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
        latency = f", {format_cost('latency_ms', best.costs['latency_ms'])} ms" if "latency_ms" in best.costs else ""
        print(
            f"generation {len(generations) - 1}/{self._iterations}  best top-1 {best.top1:.4f} at "
            f"{format_count(best.costs['macs'])} MACs{latency}  front {len(self._front(candidates))}  "
            f"{self._evaluated / seconds:.1f} subnets/s  left {left:.0f} s",
            flush=True,
        )


def print_result(best: Candidate, front: Sequence[Candidate], file: Path) -> None:
    columns = {"macs": "MACs", "params": "params", "activation_bytes": "bytes", "latency_ms": "ms"}
    shown = [cost for cost in columns if cost in best.costs]
    print(f"\n{'top-1':>8} " + " ".join(f"{columns[cost]:>10}" for cost in shown) + "  Pareto set")
    for candidate in front:
        values = " ".join(f"{format_cost(cost, candidate.costs[cost]):>10}" for cost in shown)
        print(f"{candidate.top1:8.4f} {values}  {candidate.arch}")
    print(f"\nbest: {best.arch}")
    latency = f", predicted {best.costs['latency_ms']:.4g} ms" if "latency_ms" in best.costs else ""
    print(
        f"one-shot top-1 {best.top1:.4f}, {format_count(best.costs['macs'])} MACs, "
        f"{format_count(best.costs['params'])} parameters{latency}; all evaluations are in {file}"
    )


def print_finalists(finalists: Sequence[Candidate], measured: Sequence[float], limit: Limit | None) -> None:
    """Predicted and measured latency of the last few, and what the limit was."""
    print(f"\n{'top-1':>8} {'predicted':>10} {'measured':>10} {'off by':>8}  latency in ms, best first")
    for candidate, ms in zip(finalists, measured, strict=True):
        predicted = candidate.costs["latency_ms"]
        print(f"{candidate.top1:8.4f} {predicted:10.4f} {ms:10.4f} {predicted / ms - 1:8.1%}  {candidate.arch}")
    if limit is not None:
        print(f"limit: {limit}")
