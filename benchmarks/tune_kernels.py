"""Regenerate kernels/gpu/configs/<gpu>.json: the best tiles of every kernel and shape class of the paper's Table 1.

    python benchmarks/tune_kernels.py --batch 256 --seconds 300

All candidates are compiled first, in parallel processes, and those that spill registers are dropped; then each class
times the others, best of three medians, against the rule's choice, and enters the table only where it gains 3 %.
Classes are visited from the largest on, so that a run that hits its time limit has seen to those that matter.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from bsnas.benchmarks.parts.kernel.mean_path import PlacedBlock, mean_path, table_shapes
from bsnas.benchmarks.parts.timing.turns import device_milliseconds
from bsnas.kernels.gpu import configs
from bsnas.kernels.gpu.configs import DepthwiseConfig, PointwiseConfig
from bsnas.kernels.gpu.depthwise import depthwise_backward, depthwise_forward, output_size
from bsnas.kernels.gpu.pointwise import (
    expand_backward_fused,
    input_gradient,
    pointwise_forward,
    project_backward,
    weight_gradient,
)  # fmt: skip
from bsnas.kernels.tools.ahead_of_time import compile_launch, recorded_launches, specialisation


class Case(NamedTuple):
    """One kernel at one shape: rows, inner and outer width, or a map, its channels, kernel and stride."""

    operation: str
    rows: int
    inner: int
    outer: int
    kernel: int = 0
    stride: int = 1
    size: int = 0

    @property
    def elements(self) -> int:
        return self.rows * (self.inner + self.outer)


def cases(blocks: list[PlacedBlock], batch: int) -> Iterator[Case]:
    for shape, size in blocks:
        rows_in, rows_out = batch * size**2, batch * output_size(size, shape.stride) ** 2
        yield Case("pointwise_forward", rows_in, shape.in_channels, shape.hidden)
        yield Case("pointwise_forward_prologue", rows_out, shape.hidden, shape.out_channels)
        yield Case("project_backward", rows_out, shape.hidden, shape.out_channels)
        yield Case("expand_backward", rows_in, shape.hidden, shape.in_channels)
        yield Case("input_gradient", rows_in, shape.hidden, shape.in_channels)
        yield Case("weight_gradient", rows_in, shape.hidden, shape.in_channels)
        for kernel in (3, 5, 7):
            yield Case("depthwise_forward", rows_in, shape.hidden, 0, kernel, shape.stride, size)
            yield Case("depthwise_backward", rows_in, shape.hidden, 0, kernel, shape.stride, size)


def power_of_2(width: int) -> int:
    return max(configs.next_power_of_2(width), 16)


def candidates(case: Case) -> Iterator[PointwiseConfig | DepthwiseConfig]:
    """Tiles worth trying: accumulators within 64 registers a thread or so, strips that divide the map."""
    if case.operation == "pointwise_forward":
        for m, n, warps in ((64, 64, 4), (128, 32, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8)):
            for waves in (2, 4):
                k = min(power_of_2(case.inner), 64)
                yield PointwiseConfig(m, min(n, power_of_2(case.outer)), k, warps, 3, waves)
    elif case.operation == "pointwise_forward_prologue":
        for m, k, warps, stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            n = min(power_of_2(case.outer), 256)
            if m * n // (32 * warps) <= 64 and (warps == 4 or m == 128 or n >= 64) and m * k <= 8192:
                yield PointwiseConfig(m, n, k, warps, stages, 4)
    elif case.operation == "project_backward":
        for m, n, warps, stages, waves in product((32, 64, 128), (64, 128), (4, 8), (1, 2, 3), (1, 2, 4)):
            o = min(power_of_2(case.outer), 64)
            tiles = -(-case.outer // o)
            if n * o * tiles // (32 * warps) <= 96 and m * n // (32 * warps) <= 64:
                yield PointwiseConfig(m, n, o, warps, stages, waves)
    elif case.operation == "expand_backward":
        n = power_of_2(case.outer)
        for m, warps, stages, waves in product((32, 64, 128), (4, 8), (1, 2, 3), (1, 2, 4)):
            if -(-case.inner // 64) * 64 * n // (32 * warps) <= 160 and m * 64 // (32 * warps) <= 32:
                yield PointwiseConfig(m, n, 64, warps, stages, waves)
    elif case.operation == "input_gradient":
        for m, k, warps, stages in product((64, 128), (32, 64), (4, 8), (2, 3, 4)):
            n = min(power_of_2(case.outer), 256)
            if m * n // (32 * warps) <= 64 and m * k // (32 * warps) <= 32:
                yield PointwiseConfig(m, n, k, warps, stages, 1)
    elif case.operation == "weight_gradient":
        for m, n, warps, stages, waves in product((32, 64), (64, 128), (4, 8), (1, 2, 3), (1, 2)):
            i = min(power_of_2(case.outer), 64)
            if n * i * -(-case.outer // i) // (32 * warps) <= 128:
                yield PointwiseConfig(m, n, i, warps, stages, waves)
    else:
        yield from depthwise_candidates(case)


def depthwise_candidates(case: Case) -> Iterator[DepthwiseConfig]:
    forward = case.operation == "depthwise_forward"
    width = output_size(case.size, case.stride) if forward else case.size
    for columns, per_thread, channels, warps in product((4, 7), (1, 2), (16, 32), (4,)):
        if not forward and columns % case.stride:
            continue
        ring = case.kernel * columns * (1 if forward else 2) // (case.stride if forward else 1)
        registers = (ring + case.kernel**2 * (1 if forward else 2)) * per_thread
        wasted = -(-width // columns) * columns / width
        for prefetch in (True,) if forward else (True, False):
            loads = 0 if forward or not prefetch else 3 * columns + 2 * case.kernel
            if registers + loads * per_thread <= 200 and wasted < 1.3:
                yield DepthwiseConfig(columns, 32 * warps * per_thread // channels, channels, warps, prefetch)


def prepare(case: Case, device: str) -> Callable[[Any], Any]:
    """-> the operation on random tensors of the case's shape, as a function of the configuration."""

    def random(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        if device == "meta":
            return torch.empty(size, dtype=dtype, device=device)
        return torch.randn(size, dtype=dtype, device=device)

    def vectors(rows: int, width: int) -> torch.Tensor:
        return random(rows, width, dtype=torch.float32)

    if case.kernel:
        batch = case.rows // case.size**2
        out = output_size(case.size, case.stride)
        x = random(batch, case.size, case.size, case.inner)
        y = random(batch, out, out, case.inner)
        stats, taps = vectors(4, case.inner), vectors(case.kernel**2, case.inner)
        if case.operation == "depthwise_forward":
            return lambda config: depthwise_forward(
                x, taps, y, stats, case.kernel, case.stride, statistics=True, activation="relu6", config=config
            )
        grad, coefficients, dx = random(*y.shape), vectors(3, case.inner), torch.empty_like(x)
        return lambda config: depthwise_backward(
            grad, y, coefficients, x, stats, taps, dx, case.kernel, case.stride, "relu6", config
        )
    wide, narrow = random(case.rows, case.inner), random(case.rows, case.outer)
    if case.operation.startswith("pointwise_forward"):
        weight = random(case.outer, case.inner)
        prologue = vectors(4, case.inner) if case.operation.endswith("prologue") else None
        return lambda config: pointwise_forward(
            wide, weight, narrow, prologue, statistics=True, activation="relu6", config=config
        )
    grad, dx_wide = random(case.rows, case.inner), torch.empty_like(wide)
    if case.operation == "project_backward":
        weight, y3 = random(case.outer, case.inner), random(case.rows, case.outer)
        coefficients, stats = vectors(3, case.outer), vectors(4, case.inner)
        return lambda config: project_backward(
            narrow, y3, coefficients, weight, wide, stats, dx_wide, activation="relu6", config=config
        )
    weight, coefficients, dx = random(case.inner, case.outer), vectors(3, case.inner), torch.empty_like(narrow)
    stats = vectors(4, case.inner)
    if case.operation == "expand_backward":
        return lambda config: expand_backward_fused(grad, wide, coefficients, weight, narrow, dx, None, config)
    if case.operation == "input_gradient":
        return lambda config: input_gradient(
            grad, wide, stats, coefficients, weight, dx, shortcut=None, activation=None, config=config
        )
    return lambda config: weight_gradient(grad, wide, stats, coefficients, narrow, activation=None, config=config)


def shape_class(case: Case) -> str:
    x = torch.empty((case.rows, 1), device="meta", dtype=torch.bfloat16)
    if case.kernel:
        x = torch.empty((1, 1, case.size, 1), device="meta", dtype=torch.bfloat16)
        return configs.depthwise_class(x, case.kernel, case.stride)
    return configs.pointwise_class(x, case.inner, case.outer)


def rule(case: Case) -> PointwiseConfig | DepthwiseConfig | None:
    gpu = configs.gpu_of(torch.device("cuda" if torch.cuda.is_available() else "meta"))
    if case.operation == "depthwise_forward":
        width = output_size(case.size, case.stride)
        return configs.depthwise_rule(case.kernel, case.stride, width, torch.bfloat16, gpu.operands_in_registers)
    if case.operation == "depthwise_backward":
        return configs.depthwise_backward_rule(case.kernel, case.stride, case.size)
    small = case.rows < 256 * gpu.multiprocessors
    return configs.pointwise_rule(case.operation, small, False, case.inner, case.outer, gpu.operands_in_registers)


def _compile(case: Case, config: PointwiseConfig | DepthwiseConfig, capability: int) -> str | None:
    """In a process of its own: fill Triton's cache on disk. Returns why a candidate is not to be timed."""
    try:
        launches = recorded_launches(lambda: prepare(case, "meta")(config))
        spills = max(compile_launch(launch, capability).spills for launch in launches)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return f"spills {spills} registers" if spills else None


def compile_key(case: Case, config: Any) -> tuple[Any, ...]:
    return tuple(specialisation(launch) for launch in recorded_launches(lambda: prepare(case, "meta")(config)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images a step")
    parser.add_argument("--seconds", type=float, default=600, help="time limit of compiling and timing together")
    parser.add_argument("--only", default="", help="operations to tune, by a part of their names")
    parser.add_argument("--mean-path", action="store_true", help="shapes of the mean path only")
    parser.add_argument("--output", type=Path, default=configs.DIRECTORY, help="folder of the tables")
    parser.add_argument("--json", type=Path, help="file for every timing")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    device = torch.device("cuda")
    blocks = mean_path() if args.mean_path else [*mean_path(), *table_shapes()]
    classes: dict[tuple[str, str], Case] = {}
    for case in sorted(cases(blocks, args.batch), key=lambda case: -case.elements):
        if args.only in case.operation:
            classes.setdefault((case.operation, shape_class(case)), case)
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]

    unique: dict[tuple[Any, ...], tuple[Case, Any]] = {}
    for case in classes.values():
        for config in [c for c in (rule(case), *candidates(case)) if c]:
            unique.setdefault(compile_key(case, config), (case, config))
    print(f"{len(classes)} classes, {len(unique)} kernels to compile", flush=True)
    broken = set()
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = {key: pool.submit(_compile, *pair, capability) for key, pair in unique.items()}
        for key, job in jobs.items():
            try:
                reason = job.result(timeout=max(0.1, deadline - time.monotonic() - args.seconds / 2))
            except TimeoutError:
                reason = "not compiled within half the time"
                job.cancel()
            if reason is not None:
                broken.add(key)
    print(f"compiled, {len(broken)} dropped, {deadline - time.monotonic():.0f} s left", flush=True)

    path = args.output / f"{configs.gpu_of(device).name}.json"
    table: dict[str, dict[str, list[int] | None]] = json.loads(path.read_text()) if path.exists() else {}
    log = []
    best_ms: dict[tuple[str, str], float] = {}
    for (operation, name), case in classes.items():
        if time.monotonic() > deadline:
            print("time is up", flush=True)
            break
        run = prepare(case, "cuda")
        default = rule(case)
        timed: dict[Any, float] = {}
        for config in dict.fromkeys(c for c in (default, *candidates(case)) if c):
            if compile_key(case, config) in broken:
                continue
            try:
                timed[config] = device_milliseconds(functools.partial(run, config))
            except Exception as error:  # too much shared memory for this GPU
                print(f"{operation} {name} {tuple(config)}: {type(error).__name__}", flush=True)
        if not timed:
            continue
        best = min(timed, key=lambda config: timed[config])
        ruled = timed.get(default, float("inf"))
        print(f"{operation:28} {name:34} rule {ruled:7.3f} best {timed[best]:7.3f} ms {tuple(best)}", flush=True)
        best_ms[operation, name] = timed[best]
        log.append({"operation": operation, "class": name, "case": case._asdict(),
                    "ms": {str(tuple(config)): ms for config, ms in timed.items()}})  # fmt: skip
        if timed[best] < 0.97 * ruled:
            table.setdefault(operation, {})[name] = list(best)
        else:
            table.get(operation, {}).pop(name, None)
        del run
    for (operation, name), fused in best_ms.items():
        halves = [best_ms.get((half, name)) for half in ("input_gradient", "weight_gradient")]
        if operation == "expand_backward" and None not in halves and fused > sum(halves):  # type: ignore[arg-type]
            table.setdefault(operation, {})[name] = None
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"  {json.dumps(operation)}: {{\n"
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(rows.items()))
        + "\n  }"
        for operation, rows in sorted(table.items())
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"wrote {path}")
    if args.json:
        args.json.write_text(json.dumps(log))


if __name__ == "__main__":
    main()
