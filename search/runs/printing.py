"""What a search tells its user: a line per generation, what it found, and how fast that is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsnas.engine.space.limits import Limit, format_cost, format_count
from bsnas.search.algorithms.evolution import Candidate, Generation


def print_generation(
    best: Candidate, front: int, done: Sequence[Generation], iterations: int, loaded: int, seconds: float
) -> None:
    """The best so far, the size of the front, evaluations a second, time left.

    Args:
        done: all generations, of which `loaded` were there at the start.
        iterations: the number of the last generation to come.
        seconds: since the start.
    """
    new = done[loaded:]
    left = seconds / len(new) * (iterations + 1 - len(done))
    latency = f", {format_cost('latency_ms', best.costs['latency_ms'])} ms" if "latency_ms" in best.costs else ""
    print(
        f"generation {len(done) - 1}/{iterations}  best top-1 {best.top1:.4f} at "
        f"{format_count(best.costs['macs'])} MACs{latency}  front {front}  "
        f"{sum(map(len, new)) / seconds:.1f} subnets/s  left {left:.0f} s",
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


def print_correction(best: Candidate, deviation: float, networks: int) -> None:
    """What the correction expects of the best."""
    print(
        f"expected after a training as in the first rung of the finals: top-1 {best.quality:.4f} +- {deviation:.4f}, "
        f"learned from {networks} networks"
    )


def print_finalists(finalists: Sequence[Candidate], measured: Sequence[float], limit: Limit | None) -> None:
    """Predicted and measured latency of the last few, and what the limit was."""
    print(f"\n{'top-1':>8} {'predicted':>10} {'measured':>10} {'off by':>8}  latency in ms, best first")
    for candidate, ms in zip(finalists, measured, strict=True):
        predicted = candidate.costs["latency_ms"]
        print(f"{candidate.top1:8.4f} {predicted:10.4f} {ms:10.4f} {predicted / ms - 1:8.1%}  {candidate.arch}")
    if limit is not None:
        print(f"limit: {limit}")


def print_budgets(budgets: Sequence[str], results: Sequence[dict[str, Any]]) -> None:
    """The best architecture of each budget, from the figures of its search."""
    print(f"\n{'budget':>10} {'top-1':>8} {'MACs':>10} {'new':>6}  best architecture of each budget")
    for budget, result in zip(budgets, results, strict=True):
        best, new = result["best"], result["evaluations"] - result["reused"]
        print(f"{budget:>10} {best['top1']:8.4f} {format_count(best['macs']):>10} {new:>6}  {best['arch']}")


def print_rung(number: int, epochs: int, networks: Sequence[dict[str, Any]], left: int) -> None:
    """What each network of a rung of the finals scored, the best first, and which go on."""
    print(f"\nrung {number}, {epochs} epochs and the decay\n{'top-1':>8} {'loss':>8} {'one-shot':>8} {'MACs':>10}")
    for place, row in enumerate(networks):
        end = "" if place < left else "  out"
        print(
            f"{row['top1']:8.4f} {row['loss']:8.4f} {row['one_shot']:8.4f} {format_count(row['macs']):>10}  "
            f"{row['arch']}{end}",
            flush=True,
        )
