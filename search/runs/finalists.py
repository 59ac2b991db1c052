"""The true latency of a search's last few: timed on this machine, beside what the table predicted."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bsnas.engine.host.errors import UserError
from bsnas.engine.release.onnx import Precision
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import Cost
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import Candidate
from bsnas.search.backends import BACKENDS, CannotRun, Hardware
from bsnas.search.latency_tables.bench import LatencyBench, base_ms
from bsnas.search.latency_tables.model import LatencyModel, refuse_other_device
from bsnas.search.runs.printing import print_finalists

NOISE = 0.03
"""A network whose measured latency is outside the limit by no more than this share counts as inside it."""
_BUSY = 0.1
"""Slowdown of the reference network, since the table was measured, that the user is told of."""


@dataclass(frozen=True)
class LatencyTable:
    """A latency table that a search uses, and whether networks can be timed here to check it."""

    file: Path
    model: LatencyModel
    cost: Cost
    local: bool
    """Whether it was measured on this machine."""

    @classmethod
    def of(cls, file: Path, model: LatencyModel, space: Space, *, foreign: bool) -> "LatencyTable":
        """Raises `UserError` when the table is of another device (unless `foreign`) or lacks parts of the space."""
        cost = model.cost(space)
        if not foreign:
            with _threads(model):
                refuse_other_device(model, *_hardware(model), file)
        return cls(file, model, cost, local=not foreign)


def measured_ms(table: LatencyTable, space: Space, archs: Sequence[Arch]) -> list[float]:
    """Median latency of released networks, timed in turn, in the table's context.

    On a machine that is busier than when the table was measured, the reference network tells by how much: the limit
    and the predictions are of that quieter moment, so times are scaled to it.
    """
    context = table.model.context
    precision: Precision = context.precision  # type: ignore[assignment]
    with _threads(table.model):
        bench = LatencyBench(space, BACKENDS[context.backend], batch=context.batch, precision=precision)
        timings = list(bench.networks(archs).values())
    base, quiet = base_ms(timings), float(table.model.about.get("reference_ms", float("inf")))
    if base > quiet * (1 + _BUSY):
        print(f"the machine is busy: the reference network takes {base:.4g} ms, not {quiet:.4g}; scaled to the latter")
    return [timing.ratio * min(base, quiet) for timing in timings]


def evenly_spaced(front: Sequence[Candidate], count: int) -> list[Candidate]:
    """So many members of a Pareto set, its ends among them."""
    steps = range(min(count, len(front)))
    return [front[round(k * (len(front) - 1) / max(1, len(steps) - 1))] for k in steps]


def time_finalists(
    table: LatencyTable, problem: Problem, finalists: Sequence[Candidate], best: Candidate
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Time the finalists and show them. The best whose measured latency keeps the limit takes the place of `best`.

    The rows say what was predicted and what was measured.
    """
    measured = measured_ms(table, problem.space, [candidate.arch for candidate in finalists])
    limit = next((limit for limit in problem.limits if limit.cost == "latency_ms"), None)
    print_finalists(finalists, measured, limit)
    rows = [
        {"arch": str(c.arch), "top1": c.top1, "predicted_ms": c.costs["latency_ms"], "measured_ms": ms}
        for c, ms in zip(finalists, measured, strict=True)
    ]
    if limit is not None:
        inside = first_inside(measured, limit)
        if inside is None:
            print(f"none of the {len(finalists)} measured networks keeps the limit; measure the table again")
        elif finalists[inside] != best:
            best = finalists[inside]
            print(f"taken: {best.arch}, the best one that keeps the limit as measured")
    return best, rows


def first_inside(measured: Sequence[float], limit: Limit) -> int | None:
    """Index of the first measured latency that keeps the limit, or None."""
    low, high = limit.low * (1 - NOISE), limit.high * (1 + NOISE)
    return next((k for k, ms in enumerate(measured) if low <= ms <= high), None)


def _hardware(model: LatencyModel) -> Hardware:
    """This machine, as the model's backend describes it."""
    name = model.context.backend
    if name not in BACKENDS:
        raise UserError(f"the latency table is of unknown backend {name!r}; allowed are {', '.join(BACKENDS)}")
    try:
        return BACKENDS[name].describe()
    except CannotRun as reason:
        return Hardware(f"a machine without it ({reason})", "none")


@contextmanager
def _threads(model: LatencyModel) -> Iterator[None]:
    """As many CPU threads as the table was measured with."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(model.about.get("threads", before)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
