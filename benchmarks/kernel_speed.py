"""How fast are the kernels? One row per kernel, block and network: time, GB/s, share of the floor, ratio to eager.

    python benchmarks/kernel_speed.py --json speed.json

On a GPU: bf16, 256 images of 224x224 through the mean path of the paper's Table 1
(benchmarks/parts/kernel/mean_path.py), eager, torch.compile and the Triton kernels, launched one by one and as one CUDA
graph. On a CPU: 64 images of 64x64 through the same blocks in every precision and layout that eager PyTorch offers,
compiled and not, against the oneDNN backend; and folded blocks against eager ones, first with glibc's own allocator
setting, then with the one of training, so that the allocator's share shows. Values are checked first, in the same
process, with the code that is then timed. Rows are appended to benchmarks/results/. Compiled contenders take minutes to
start the first time; torch keeps what it compiled.
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
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.benchmarks.kernel_bytes import bytes_moved
from bsnas.benchmarks.parts.kernel.mean_path import SEPARABLE, STEM, TAIL, PathNetwork, PlacedBlock, mean_path
from bsnas.benchmarks.parts.timing.provenance import device_name, provenance
from bsnas.benchmarks.parts.timing.turns import (
    RESULTS,
    alternating_milliseconds,
    append_rows,
    device_milliseconds,
    quantiles,
)
from bsnas.engine.host.allocator import keep_freed_memory
from bsnas.engine.runs.commands import environment
from bsnas.kernels import BlockShape, BlockWeights, inference, inverted_residual, set_backend

LEVEL_C_IMAGES_PER_S = 33_800
"""Floor of a training step of the mean path on an H100, bf16, if only raw convolution outputs reach memory."""


# ---- single kernels (GPU)


def time_kernels(blocks: list[PlacedBlock], batch: int, copy_gb_s: float) -> list[dict[str, Any]]:
    from bsnas.kernels.tools.ahead_of_time import recorded_launches

    rows = []
    for index, (shape, size) in enumerate(blocks):
        step = block_step("triton", shape, batch, size, torch.bfloat16, "cuda")
        step()
        launches = recorded_launches(step, execute=True)
        for launch in launches:
            kernel = launch.fn[launch.grid]
            ms = device_milliseconds(lambda kernel=kernel, launch=launch: kernel(**launch.arguments, **launch.options))  # type: ignore[misc]
            moved, _, floor = bytes_moved(launch)
            rows.append({
                "kind": "kernel", "name": launch.name.removesuffix("_kernel"),
                "shape": describe(shape, size, index + 1),
                "contender": "triton", "us": 1000 * ms, "GB_s": moved / ms / 1e6,
                "share_of_floor": floor / copy_gb_s / 1e6 / ms, "moved_over_floor": moved / floor if floor else None,
            })  # fmt: skip
        del launches, step
    return rows


def network_launches(batch: int, resolution: int) -> list[Any]:
    """All launches of a training step, for compiling them in parallel before the first one."""
    from bsnas.kernels.tools.ahead_of_time import block_launches, tail_launches

    blocks = mean_path(resolution)
    launches = block_launches(BlockShape(STEM, STEM, SEPARABLE, 3, 1), batch, resolution // 2, torch.bfloat16, False)
    for shape, size in blocks:
        launches += block_launches(shape, batch, size, torch.bfloat16)
    last, size = blocks[-1]
    return launches + tail_launches(last.out_channels, TAIL, batch, -(-size // last.stride), torch.bfloat16)


def describe(shape: BlockShape, size: int, index: int) -> str:
    widths = f"{shape.in_channels}-{shape.hidden}-{shape.out_channels}"
    return f"block {index}: {widths} k{shape.kernel} s{shape.stride} {size}x{size}"


def copy_bandwidth() -> float:
    """GB/s of a large copy on this GPU, bytes read and written: what 'floor' is taken against."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / device_milliseconds(lambda: target.copy_(source), 11) / 1e6


# ---- blocks


def block_step(
    backend: str, shape: BlockShape, batch: int, size: int, dtype: torch.dtype, device: str,
    memory_format: torch.memory_format = torch.channels_last, compiled: bool = False,
    keep: dict[str, Any] | None = None,
) -> Callable[[], Any]:  # fmt: skip
    """-> forward and backward of one block from the same random values for every contender."""
    generator = torch.Generator().manual_seed(0)

    def random(*dims: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(dims, generator=generator) * scale).to(device)

    weights = BlockWeights(
        random(shape.hidden, shape.in_channels, scale=shape.in_channels**-0.5),
        random(shape.hidden, 1, shape.kernel, shape.kernel, scale=1 / shape.kernel),
        random(shape.out_channels, shape.hidden, scale=shape.hidden**-0.5),
    )
    convolutions = [weight for weight in weights if weight is not None]
    for weight in convolutions:
        weight.requires_grad_()
    norms = tuple(nn.BatchNorm2d(c).to(device) for c in (shape.hidden, shape.hidden, shape.out_channels))
    x = random(batch, shape.in_channels, size, size).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    out = -(-size // shape.stride)
    grad = random(batch, shape.out_channels, out, out).to(dtype).contiguous(memory_format=memory_format)

    def forward(x: Tensor) -> Tensor:
        return inverted_residual(x, weights, norms, shape, training=True, backend=backend)  # type: ignore[arg-type]

    if compiled:
        forward = torch.compile(forward, dynamic=False)
    leaves = [x, *convolutions, *(p for norm in norms for p in norm.parameters())]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        z = forward(x)
        z.backward(grad)
        if keep is not None:
            keep.update(z=z.detach(), **{f"grad{i}": leaf.grad for i, leaf in enumerate(leaves)})

    return step


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30))


def check_block(shape: BlockShape, size: int) -> None:
    """Triton and eager in bf16 against float32 eager: ours must not be worse by more than a quarter, in the mean."""
    found: dict[str, dict[str, Tensor]] = {"exact": {}, "eager": {}, "triton": {}}
    for name, keep in found.items():
        backend, dtype = ("triton" if name == "triton" else "reference"), torch.bfloat16
        block_step(backend, shape, 16, size, torch.float32 if name == "exact" else dtype, "cuda", keep=keep)()
    errors = {
        name: [relative_error(found[name][key], found["exact"][key]) for key in found["exact"]]
        for name in ("eager", "triton")
    }
    ratio = sum(errors["triton"]) / sum(errors["eager"])
    assert ratio < 1.25, (shape, errors)


def time_blocks(blocks: list[PlacedBlock], batch: int, compiled: bool) -> list[dict[str, Any]]:
    rows = []
    for index, (shape, size) in enumerate(blocks):
        check_block(shape, size)
        contenders: dict[str, Callable[[], Any]] = {
            "eager bf16 channels_last": block_step("reference", shape, batch, size, torch.bfloat16, "cuda"),
            "triton": block_step("triton", shape, batch, size, torch.bfloat16, "cuda"),
        }
        if compiled:
            contenders["torch.compile"] = block_step(
                "reference", shape, batch, size, torch.bfloat16, "cuda", compiled=True
            )
        contenders["triton, CUDA graph"] = captured(contenders["triton"])
        rows += contender_rows("block", describe(shape, size, index + 1), contenders, cuda=True, rounds=5, calls=5)
    return rows


def contender_rows(
    kind: str, shape: str, contenders: dict[str, Callable[[], Any]], *, cuda: bool, rounds: int, calls: int
) -> list[dict[str, Any]]:
    """Ratios refer to the best of the contenders whose names begin with 'eager', and are taken within a round."""
    times = alternating_milliseconds(contenders, cuda=cuda, rounds=rounds, calls=calls)
    best_eager = min(
        (values for name, values in times.items() if name.startswith("eager")), key=lambda values: quantiles(values)[1]
    )
    rows = []
    for name, values in times.items():
        p20, p50, p80 = quantiles(values)
        rows.append({
            "kind": kind, "name": "train step", "shape": shape, "contender": name, "us": 1000 * p50,
            "us_p20": 1000 * p20, "us_p80": 1000 * p80, "speedup_vs_best_eager": ratio_of_rounds(best_eager, values),
        })  # fmt: skip
    return rows


def ratio_of_rounds(theirs: list[float], ours: list[float]) -> float:
    """Median over rounds of theirs / ours; a contender so slow that it ran once counts as equally slow in each."""
    rounds = max(len(theirs), len(ours))
    pairs = zip(theirs * (rounds if len(theirs) == 1 else 1), ours * (rounds if len(ours) == 1 else 1), strict=True)
    return quantiles([their / our for their, our in pairs])[1]


# ---- the whole network


def network_step(net: nn.Module, x: Tensor, labels: Tensor, autocast: torch.dtype | None) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=4e-5, foreach=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            logits = net(x)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def on_backend(backend: str, step: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        set_backend(backend)
        try:
            return step()
        finally:
            set_backend(None)

    return run


def images(batch: int, resolution: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, resolution, resolution, generator=generator)
    return x.to(device), torch.randint(0, 1000, (batch,), generator=generator).to(device)


def fresh_network(device: str, resolution: int, layout: torch.memory_format) -> PathNetwork:
    torch.manual_seed(0)
    return PathNetwork(resolution).to(device).to(memory_format=layout)  # type: ignore[call-overload]


def check_network(resolution: int, device: str, contender: str, autocast: torch.dtype | None) -> dict[str, float]:
    """Losses of three steps from the same weights: in float64, eager as timed, and ours as timed.

    Batch statistics of 19 blocks amplify rounding, so ours is allowed twice eager's distance from float64.
    """
    x, labels = images(32, resolution, device)
    losses = {}
    for name, backend, dtype, kind in (
        ("float64", "reference", torch.float64, None),
        ("eager", "reference", torch.float32, autocast),
        ("ours", contender, torch.float32, autocast),
    ):
        net = fresh_network(device, resolution, torch.channels_last).to(dtype)
        inputs = x.to(dtype).contiguous(memory_format=torch.channels_last)
        step = on_backend(backend, network_step(net, inputs, labels, kind))
        losses[name] = [float(step()) for _ in range(3)][-1]
    drift = abs(losses["ours"] - losses["float64"]), abs(losses["eager"] - losses["float64"])
    assert drift[0] <= max(2 * drift[1], 2e-2 if autocast else 1e-4), losses
    return losses


def time_network(batch: int, resolution: int, compiled: bool) -> list[dict[str, Any]]:
    print("losses after 3 steps", check_network(resolution, "cuda", "triton", torch.bfloat16), flush=True)
    x, labels = images(batch, resolution, "cuda")
    x = x.contiguous(memory_format=torch.channels_last)

    def step(backend: str, compile_it: bool = False) -> Callable[[], Any]:
        net: Any = fresh_network("cuda", resolution, torch.channels_last)
        if compile_it:
            net = torch.compile(net, dynamic=False)
        return on_backend(backend, network_step(net, x, labels, torch.bfloat16))

    contenders = {"triton": step("triton"), "eager bf16 channels_last": step("reference")}
    for name in list(contenders):
        torch.cuda.reset_peak_memory_stats()
        contenders[name]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
        print(f"{name}: peak {100 * peak:.0f} % of the memory", flush=True)
        torch.cuda.empty_cache()
        if peak < 0.4:  # a graph keeps its own memory beside the launched contender's
            contenders[f"{name}, CUDA graph"] = captured(contenders[name])
    if compiled:
        contenders["torch.compile"] = step("reference", compile_it=True)
    rows = contender_rows(
        "network", f"mean path, {batch} x {resolution}x{resolution}", contenders, cuda=True, rounds=7, calls=3
    )
    for row in rows:
        row["images_per_s"] = batch / row["us"] * 1e6
        row["share_of_floor"] = row["images_per_s"] / LEVEL_C_IMAGES_PER_S if resolution == 224 else None
    return rows


def time_network_cpu(batch: int, resolution: int, compiled: bool, rounds: int) -> list[dict[str, Any]]:
    """Ours against every way that plain torch offers: precision, layout, compiled or not."""
    print("losses after 3 steps", check_network(resolution, "cpu", "onednn", None), flush=True)
    x, labels = images(batch, resolution, "cpu")

    def step(layout: torch.memory_format, autocast: torch.dtype | None, compile_it: bool) -> Callable[[], Any]:
        net: Any = fresh_network("cpu", resolution, layout)
        if compile_it:
            net = torch.compile(net, dynamic=False)
        return network_step(net, x.contiguous(memory_format=layout), labels, autocast)

    ways = product(
        (False, True) if compiled else (False,),
        {"fp32": None, "bf16": torch.bfloat16}.items(),
        {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}.items(),
    )
    contenders: dict[str, Callable[[], Any]] = {}
    for compile_it, (precision, autocast), (layout, memory_format) in ways:
        name = f"eager {precision} {layout}{', compiled' if compile_it else ''}"
        contenders[name] = on_backend("reference", step(memory_format, autocast, compile_it))
    contenders["onednn"] = on_backend("onednn", step(torch.channels_last, None, False))
    rows = contender_rows(
        "network", f"mean path, {batch} x {resolution}x{resolution}", contenders, cuda=False, rounds=rounds, calls=2
    )
    for row in rows:
        row["images_per_s"] = batch / row["us"] * 1e6
    return rows


# ---- folded block (evaluation)


def folded_block(
    shape: BlockShape, batch: int, size: int, dtype: torch.dtype, device: str, backend: str | None
) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*dims: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(dims, generator=generator) * scale).to(device=device, dtype=dtype)

    x = random(batch, shape.in_channels, size, size).contiguous(memory_format=torch.channels_last)
    expand = random(shape.hidden, shape.in_channels, scale=shape.in_channels**-0.5)
    depthwise = random(shape.hidden, 1, shape.kernel, shape.kernel, scale=1 / shape.kernel)
    project = random(shape.out_channels, shape.hidden, scale=shape.hidden**-0.5)
    biases = [random(c) for c in (shape.hidden, shape.hidden, shape.out_channels)]
    if backend is None and device == "cpu":
        depthwise = inference.packed_depthwise(depthwise, size, shape.stride)

    def run() -> Tensor:
        with torch.no_grad():
            h = inference.folded_pointwise(x, expand, biases[0], activation="relu6", backend=backend)
            h = inference.folded_depthwise(
                h, depthwise, biases[1], stride=shape.stride, activation="relu6", backend=backend
            )
            residual = x if shape.residual else None
            return inference.folded_pointwise(
                h, project, biases[2], activation=None, residual=residual, backend=backend
            )

    return run


def time_folded(
    blocks: list[PlacedBlock], batch: int, dtype: torch.dtype, device: str, rounds: int
) -> list[dict[str, Any]]:
    """Folded blocks on the device's fused backend against the plain folded convolutions, same layout and precision."""
    rows = []
    for index, (shape, size) in enumerate(blocks):
        ours = "triton" if device == "cuda" else None
        contenders = {
            "eager folded": folded_block(shape, batch, size, dtype, device, "reference"),
            ours or "onednn": folded_block(shape, batch, size, dtype, device, ours),
        }
        expected, found = (run() for run in contenders.values())
        assert relative_error(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5), describe(
            shape, size, index
        )
        new = contender_rows(
            "folded block", describe(shape, size, index + 1), contenders, cuda=device == "cuda", rounds=rounds, calls=5
        )
        rows += [row | {"name": "inference"} for row in new]
    return rows


# ---- main

COLUMNS = (
    "kind", "name", "shape", "contender", "us", "us_p20", "us_p80", "GB_s", "share_of_floor", "moved_over_floor",
    "images_per_s", "speedup_vs_best_eager", "freed_memory",
)  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        values = [f"{row['us']:10.1f} us"]
        for key in ("GB_s", "images_per_s", "share_of_floor", "speedup_vs_best_eager"):
            if row.get(key) is not None:
                values.append(f"{key} {row[key]:.2f}")
        print(f"{row['kind']:13}{row['name']:24}{row['shape']:40}{row['contender']:38}", *values, flush=True)


def total_speedup(rows: list[dict[str, Any]], contender: str) -> float:
    """Of the summed times over all shapes."""
    return total_us(rows, "eager folded") / total_us(rows, contender)


def total_us(rows: list[dict[str, Any]], contender: str) -> float:
    return float(sum(row["us"] for row in rows if row["contender"] == contender))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["kernels", "blocks", "network", "folded"], help="what to time",
                        choices=["kernels", "blocks", "network", "folded"])  # fmt: skip
    parser.add_argument("--batch", type=int, help="images; 256 on a GPU, 64 on a CPU")
    parser.add_argument("--resolution", type=int, help="pixels; 224 on a GPU, 64 on a CPU")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes minutes to start"
    )
    parser.add_argument("--rounds", type=int, default=7, help="figures per contender")
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU; by default all cores")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernel_speed.csv", help="CSV file to append rows to")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = args.batch or (256 if cuda else 64)
    resolution = args.resolution or (224 if cuda else 64)
    blocks = mean_path(resolution)
    origin = provenance() | {
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
        "triton": environment(torch.device(device))["versions"].get("triton", "none"),
    }
    figures: dict[str, Any] = {"device": origin, "rows": []}
    freed_memory = "returned"

    def keep(rows: list[dict[str, Any]]) -> None:
        show(rows)
        figures["rows"] += [row | {"freed_memory": freed_memory} for row in rows]

    if not cuda and "folded" in args.parts:  # glibc's own setting cannot be had back later
        keep(time_folded(blocks, batch, torch.float32, device, args.rounds))
        figures["folded_block_speedup_vs_eager_memory_returned"] = total_speedup(figures["rows"], "onednn")
        returned = total_us(figures["rows"], "eager folded")
    keep_freed_memory()
    freed_memory = "kept"

    if cuda:
        from bsnas.kernels.tools.ahead_of_time import fill_cache

        major, minor = torch.cuda.get_device_capability()
        for images_ in (batch, 32, 16):  # 32 and 16: the checks
            fill_cache(
                functools.partial(network_launches, images_, resolution), 10 * major + minor, os.cpu_count() or 1
            )
        figures["copy_gb_s"] = copy_bandwidth()
        print(f"copy: {figures['copy_gb_s']:.0f} GB/s", flush=True)
    if "network" in args.parts:
        compiled = not args.no_compile
        rows = (
            time_network(batch, resolution, compiled)
            if cuda
            else time_network_cpu(batch, resolution, compiled, args.rounds)
        )
        keep(rows)
        ours = [row["speedup_vs_best_eager"] for row in rows if row["contender"].startswith(("triton", "onednn"))]
        figures["train_step_speedup_vs_best_eager"] = max(ours)
    if "folded" in args.parts:
        rows = time_folded(blocks, batch, torch.bfloat16 if cuda else torch.float32, device, args.rounds)
        keep(rows)
        figures["folded_block_speedup_vs_eager"] = total_speedup(rows, "triton" if cuda else "onednn")
        if not cuda:
            figures["allocator_speedup_of_eager"] = returned / total_us(rows, "eager folded")
    if cuda and "kernels" in args.parts:
        keep(time_kernels(blocks, batch, figures["copy_gb_s"]))
    if cuda and "blocks" in args.parts:
        keep(time_blocks(blocks, batch, not args.no_compile))
    for key, value in figures.items():
        if "speedup" in key:
            print(f"{key} {value:.2f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    append_rows(
        args.results,
        [figures["device"] | {c: row.get(c) for c in COLUMNS} for row in figures["rows"]],
    )


if __name__ == "__main__":
    main()
