"""Measure a latency table: what every operation costs on a backend of this machine, and how well sums of it predict.

python search/latency.py --run runs/digits
python search/latency.py --run runs/digits --backend tensorrt --batch 8 --precision fp16

Every form that an operation can have in a released network is timed as the backend runs it, in stacks of copies. A
correction is fitted to fair-sampled networks timed whole, its form chosen by cross-validation, and the errors are those
on other, random networks. Timings are kept in latency/timings.sqlite of the run, so a second call goes on where the
first one was stopped. The table, latency/model-BACKEND-bBATCH-PRECISION.json, is what search/evolve.py --max-latency-ms
reads.
"""

import os
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.release.onnx import Precision
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import fair_archs, uniform_arch
from bsnas.engine.space.space import Space
from bsnas.search.backends import BACKENDS, CannotRun
from bsnas.search.latency_tables.bench import LatencyBench, base_ms
from bsnas.search.latency_tables.fit import best_fit, errors_of, kendall_tau, part_counts
from bsnas.search.latency_tables.model import LatencyModel, PartCost
from bsnas.search.latency_tables.timings import Timing, TimingStore

_DRAWS = 50
"""Random draws for each wanted architecture before a space counts as having too few."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class LatencyTableArguments:
    run: Path
    """Run directory with a configuration; its weights are not needed."""
    backend: str = "onnxruntime-cpu"
    """What runs the networks: torch-cpu, torch-cuda, onnxruntime-cpu, onnxruntime-cuda, tensorrt or tensorrt-rtx."""
    batch: int = 1
    """Images in a batch; latencies are of the whole batch."""
    precision: Precision = "fp32"
    """Type of weights and activations."""
    space: Literal["auto", "live", "full"] = "auto"
    """`live`: operations that shrinking left. `full`: all. `auto`: live, unless it has too few networks to test on."""
    fit: int = 80
    """Networks timed whole that the correction is fitted to."""
    held_out: int = 50
    """Other networks timed whole that give the errors."""
    visits: int = 100
    """Timings of each part or network, each beside one of the reference network."""
    max_seconds: float = 2.0
    """A part or network is timed no longer than this, with at least five visits."""
    threads: int | None = None
    """CPU threads; by default as many as cores that this process may use."""
    seed: int = 0
    """Seed of the networks that are drawn."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"backend {self.backend!r} is unknown; allowed are {', '.join(BACKENDS)}")
        if min(self.batch, self.visits, 1 if self.threads is None else self.threads) < 1:
            raise UserError("batch, visits and threads must be at least 1")
        if self.fit < 10 or self.held_out < 2:
            raise UserError(f"fit {self.fit} and held-out {self.held_out}: at least 10 and 2 networks are needed")


def main() -> None:
    arguments = parse(LatencyTableArguments, __doc__, sys.argv[1:])
    run_dir = RunDir.open(arguments.run)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    with run_dir.lock():
        figures = measure_table(run_dir, arguments)
    write_figures(arguments.json, figures)


def measure_table(run_dir: RunDir, arguments: LatencyTableArguments) -> dict[str, Any]:
    """Measure what is missing, fit, write the table, and return the figures of --json."""
    space, fitted, held_out = choose_networks(run_dir.spaces()[-1], arguments)
    torch.manual_seed(arguments.seed)
    try:
        bench = LatencyBench(
            space,
            BACKENDS[arguments.backend],
            batch=arguments.batch,
            precision=arguments.precision,
            visits=arguments.visits,
            max_seconds=arguments.max_seconds,
            seed=arguments.seed,
        )
    except CannotRun as reason:
        raise UserError(
            f"{arguments.backend} cannot measure {arguments.precision} here: {reason}; choose another --backend or "
            "--precision, or measure on the machine that has it"
        ) from None
    timings = time_missing(bench, TimingStore(run_dir.timings_file), [*fitted, *held_out])
    model = fit_model(bench, space, timings, fitted, held_out)
    context = bench.context
    file = run_dir.latency_table(context.backend, context.batch, context.precision)
    model.save(file)
    figures = {
        **asdict(context),
        "parts": len(model.parts),
        "correction": model.correction,
        **model.errors,
        **model.about,
        "networks": held_out_rows(model, space, timings, held_out),
        "file": str(file),
    }
    show(model, file)
    return figures


def choose_networks(live: Space, arguments: LatencyTableArguments) -> tuple[Space, list[Arch], list[Arch]]:
    """The space to measure, networks to fit the correction to, and others to test it on, all different."""
    wanted = arguments.fit + arguments.held_out
    spaces = {"live": [live], "full": [live.full()], "auto": [live, live.full()]}[arguments.space]
    for space in spaces:
        drawn_fairly = fair_archs(space, arguments.seed, _DRAWS * arguments.fit)
        fitted = list(dict.fromkeys(drawn_fairly))[: arguments.fit]
        rng = random.Random(f"{arguments.seed}/held-out")
        drawn = (uniform_arch(space, rng) for _ in range(_DRAWS * arguments.held_out))
        held_out = list(dict.fromkeys(arch for arch in drawn if arch not in fitted))[: arguments.held_out]
        if len(fitted) == arguments.fit and len(held_out) == arguments.held_out:
            return space, fitted, held_out
    raise UserError(
        f"the {'live' if arguments.space == 'live' else 'full'} space has {spaces[-1].num_architectures} "
        f"architectures and {wanted} different ones are needed; lower --fit and --held-out, or take --space full"
    )


def time_missing(bench: LatencyBench, store: TimingStore, archs: Sequence[Arch]) -> dict[str, Timing]:
    """The timings of all parts of the space and of whole networks; what is not stored yet is measured and stored."""
    known = store.load(bench.context)
    parts = [part for part in bench.parts.all_parts() if str(part) not in known]
    networks = [arch for arch in archs if str(arch) not in known]

    def measured() -> Iterator[Mapping[str, Timing]]:
        for part in _progress(parts, "timing parts"):
            yield {str(part): bench.part(part)}
        for start in _progress(range(0, len(networks), bench.group), "timing networks"):
            group = bench.networks(networks[start : start + bench.group])
            yield {str(arch): timing for arch, timing in group.items()}

    try:
        for timings in measured():
            store.save(bench.context, timings)
    except CannotRun as reason:
        raise UserError(
            f"{bench.context.backend} does not run a part of the networks: {reason}; choose another --precision"
        ) from None
    finally:
        known = store.load(bench.context)
        store.close()
    return known


def _progress(items: Sequence[Item], title: str) -> Iterable[Item]:
    return track(items, title, console=Console(stderr=True), transient=True) if items else ()


def fit_model(
    bench: LatencyBench, space: Space, timings: Mapping[str, Timing], fitted: Sequence[Arch], held_out: Sequence[Arch]
) -> LatencyModel:
    """The model whose correction predicts networks left out of its fit best, with its errors on the held-out ones."""
    base = base_ms(list(timings.values()))
    names = [str(part) for part in bench.parts.all_parts()]
    columns = {name: column for column, name in enumerate(names)}
    values = np.maximum([timings[name].ratio * base for name in names], 0)

    def latencies(archs: Sequence[Arch]) -> np.ndarray:
        return np.array([timings[str(arch)].ratio * base for arch in archs])

    def counts(archs: Sequence[Arch]) -> np.ndarray:
        return part_counts([[str(part) for part in bench.parts.parts(arch)] for arch in archs], columns)

    form, offset, costs, validated = best_fit(values, counts(fitted), latencies(fitted))
    predicted, measured = offset + counts(held_out) @ costs, latencies(held_out)
    macs = [CostModel(space).macs(arch) for arch in held_out]
    return LatencyModel(
        context=bench.context,
        space=space.fingerprint,
        correction=form,
        offset_ms=offset,
        parts={
            name: PartCost(
                ms=float(cost),
                timed_ms=float(value),
                spread_ms=timings[name].spread * base,
                visits=timings[name].visits,
            )
            for name, cost, value in zip(names, costs, values, strict=True)
        },
        errors=asdict(errors_of(predicted.tolist(), measured.tolist())),
        about={
            "reference_ms": base,
            "threads": torch.get_num_threads(),
            "fitted": len(fitted),
            "cross_validated_mape": validated,
            "kendall_tau_of_macs": kendall_tau(macs, measured.tolist()),
            "held_out_ms": [float(measured.min()), float(np.median(measured)), float(measured.max())],
        },
    )


def held_out_rows(
    model: LatencyModel, space: Space, timings: Mapping[str, Timing], held_out: Sequence[Arch]
) -> list[dict[str, Any]]:
    """What the errors were computed from: predicted and measured latency of every held-out network, in ms."""
    predict, macs, base = model.cost(space), CostModel(space).macs, model.about["reference_ms"]
    return [
        {
            "arch": str(arch),
            "macs": macs(arch),
            "predicted_ms": predict(arch),
            "measured_ms": timings[str(arch)].ratio * base,
            "spread_ms": timings[str(arch)].spread * base,
        }
        for arch in held_out
    ]


def show(model: LatencyModel, file: Path) -> None:
    context, errors = model.context, model.errors
    low, middle, high = model.about["held_out_ms"]
    print(f"{context.device}; {context.versions}; batch {context.batch}, {context.precision}")
    print(f"{len(model.parts)} parts, correction: {model.correction}, constant {model.offset_ms:.4f} ms")
    print(
        f"on {errors['held_out']} held-out networks of {low:.3f} to {high:.3f} ms (median {middle:.3f}): "
        f"MAPE {errors['mape']:.2%}, max error {errors['max_error']:.2%}, Kendall tau {errors['kendall_tau']:.3f} "
        f"(of MACs alone {model.about['kendall_tau_of_macs']:.3f})"
    )
    print(f"table: {file}")


if __name__ == "__main__":
    run(main)
