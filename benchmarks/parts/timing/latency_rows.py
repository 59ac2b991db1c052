"""The rows of benchmarks/latency.py: every network on every backend, with parity, size, memory and layer times."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import Tensor, nn

from bsnas.benchmarks.parts.timing.turns import write_csv
from bsnas.engine.release.onnx import Precision, compare_logits, torch_logits
from bsnas.search.backends import BACKENDS, CannotRun, Model, Session, session_logits
from bsnas.search.backends.timing import Timed, measure_in_turn

PARITY_BATCHES = 32
"""Batches that each row's answers are compared on."""
PROFILED_RUNS = 20


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long each row is timed."""

    repeats: int
    passes: int
    warmup_seconds: float
    max_seconds: float


@dataclass(frozen=True)
class Network:
    """A network to time, and what its answers must be."""

    model: Model
    images: Tensor
    """Real images [N, 3, H, W], normalised."""
    expected: npt.NDArray[np.float32]
    """Logits of torch in fp32 [N, classes]."""
    macs: int

    @classmethod
    def of(cls, model: Model, images: Tensor) -> "Network":
        return cls(model, images, torch_logits(model.network, images), count_macs(model.network, images[:1]))


@dataclass(frozen=True)
class Case:
    """One row to come: a session that is open, and what is known of it before it is timed."""

    session: Session
    row: dict[str, Any]


def measure_rows(
    networks: Sequence[Network],
    backends: Sequence[str],
    precisions: Sequence[Precision],
    batch_sizes: Sequence[int],
    effort: Effort,
    profiles: Path | None,
) -> list[dict[str, Any]]:
    """A row per network, backend, precision and batch size: its figures, or why it did not run.

    All rows of a batch size are timed in turn, so that they compare on a machine that others use. With `profiles`, each
    session's layers are then timed by themselves into CSV files of that directory.
    """
    rows: list[dict[str, Any]] = []
    hardware: dict[str, str] = {}
    for name in backends:
        try:
            hardware[name] = str(BACKENDS[name].describe())
        except CannotRun as reason:
            rows.append({"backend": name, "why": str(reason)})
    ways = [(network, name, precision) for network in networks for name in hardware for precision in precisions]
    refused: set[int] = set()
    for batch in batch_sizes:
        cases: list[Case] = []
        for place, (network, name, precision) in enumerate(ways):
            if place in refused:
                continue
            head = {"network": network.model.name, "backend": name, "precision": precision, "batch": batch}
            try:
                cases.append(open_case(network, name, precision, batch, head))
            except CannotRun as reason:
                refused.add(place)
                rows.append({**head, "why": str(reason)})
        for case, timed in zip(cases, time_cases(cases, batch, effort), strict=True):
            rows.append(
                {
                    **case.row,
                    **timed.latency._asdict(),
                    "slowdown": timed.slowdown,
                    "hardware": hardware[case.row["backend"]],
                }
            )
            if profiles is not None:
                write_profile(case, profiles)
    order = {network.model.name: place for place, network in enumerate(networks)}
    return sorted(rows, key=lambda row: (order.get(row.get("network", ""), -1), list(BACKENDS).index(row["backend"])))


def open_case(network: Network, backend: str, precision: Precision, batch: int, head: dict[str, Any]) -> Case:
    """Open a session, compare its answers, and leave a full batch loaded. Raises `CannotRun`."""
    memory = memory_meter(backend)
    session = BACKENDS[backend].open(network.model, precision, batch)
    count = min(len(network.images), PARITY_BATCHES * batch)
    parity = compare_logits(session_logits(session, network.images[:count], batch), network.expected[:count])
    size = {"engine_bytes": session.engine_bytes, "memory_mib": memory()}
    return Case(session, {**head, "macs": network.macs, **parity._asdict(), **size})


def time_cases(cases: Sequence[Case], batch: int, effort: Effort) -> list[Timed]:
    return measure_in_turn(
        [case.session for case in cases],
        batch,
        repeats=effort.repeats,
        passes=effort.passes,
        max_seconds=effort.max_seconds,
        warmup_seconds=effort.warmup_seconds,
        rng=random.Random(batch),
    )


def write_profile(case: Case, directory: Path) -> None:
    """Times of a session's layers as profile-NETWORK-BACKEND-PRECISION-bBATCH.csv; a line where it has none."""
    row = case.row
    name = f"{row['network']}-{row['backend']}-{row['precision']}-b{row['batch']}"
    try:
        layers = case.session.layer_times_ms(PROFILED_RUNS)
    except CannotRun as reason:
        print(f"no profile of {name}: {reason}")
        return
    write_csv(directory / f"profile-{name}.csv", [{"layer": layer, "ms": ms} for layer, ms in layers])


@torch.inference_mode()
def count_macs(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers for one image [1, C, H, W]."""
    total = 0

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(layer.weight, Tensor)
        total += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    network(image)
    for hook in hooks:
        hook.remove()
    return total


def memory_meter(backend: str) -> Callable[[], float]:
    """Tells how much memory came into use since: MiB of the GPU as a whole, or of this process."""

    def used() -> float:
        if torch.cuda.is_available() and not backend.endswith("cpu"):
            free, total = torch.cuda.mem_get_info()
            return (total - free) / 2**20
        return psutil.Process().memory_info().rss / 2**20

    before = used()
    return lambda: max(0.0, used() - before)
