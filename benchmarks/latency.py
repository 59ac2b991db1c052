"""How fast is the released network on this machine, and does each backend compute what torch computes?

python benchmarks/latency.py --run runs/digits --batch-sizes 1 8 32 --precisions fp32 fp16
python benchmarks/latency.py --run runs/digits --backends torch-cpu onnxruntime-cpu --peers mobilenet_v2 --profile

Time is wall clock for one batch from the call to the logits, the input already on the device. Parity is against torch
in fp32 on real images. A backend that cannot run says why. Where TensorRT-RTX is installed but cannot run, its engines
are built ahead of time for --targets. All rows are in latency/latency.json and .csv of the run, a plot of MACs against
latency in latency/latency.png, and with --profile a CSV of layer times per row, from runs of their own.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.latency_report import count_macs, memory_mib, plot_latency, write_csv
from benchmarks.provenance import provenance
from engine.atomic import write_atomically
from engine.chosen_network import choose_network
from engine.cli import parse, write_figures
from engine.errors import UserError, run
from engine.journal import recorded
from engine.onnx_export import Precision, compare_logits, torch_logits
from engine.rundir import RunDir, write_json
from search.backends import BACKENDS, CannotRun, Model, session_logits
from search.backends.tensorrt import RTX_TARGETS, build_engine, import_package, network_layers
from search.backends.timing import measure

PARITY_BATCHES = 32
"""Batches that each row's answers are compared on."""
PROFILED_RUNS = 20
PEERS = ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "mnasnet1_0")


@dataclass(frozen=True, kw_only=True)
class LatencyArguments:
    run: Path
    """Run directory with a retrained network, or with a trained supernet when --arch is given."""
    arch: str | None = None
    """Architecture to measure with inherited weights instead of the retrained network."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Backends to try."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Images in a batch."""
    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    """Types of weights and activations."""
    peers: tuple[str, ...] = ()
    """Networks of torchvision to measure in the same way, with random weights."""
    targets: tuple[str, ...] = RTX_TARGETS
    """GPU generations that TensorRT-RTX builds engines for where it cannot run them."""
    profile: bool = False
    """Also time every layer, in separate runs, into latency/profile-*.csv."""
    save_engines: bool = True
    """Keep the engines that are built ahead of time, in latency/engines/."""
    repeats: int = 200
    """Timed runs per row."""
    warmup: int = 20
    """Runs before them that do not count."""
    warmup_seconds: float = 0.3
    """Least time of the warmup, in which the device leaves its power-saving state."""
    max_seconds: float = 2.0
    """A row's warmup and its timed runs each end after this time, with fewer runs but at least ten."""
    images: int = 200
    """Most real images to compare the answers on; small batches take fewer."""
    threads: int | None = None
    """CPU threads; by default as many as cores that this process may use."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        for name, allowed in (("backends", tuple(BACKENDS)), ("peers", PEERS), ("targets", RTX_TARGETS)):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise UserError(f"{name} {', '.join(unknown)} unknown; allowed are {', '.join(allowed)}")
        numbers = (*self.batch_sizes, self.repeats, self.images, 1 if self.threads is None else self.threads)
        if min(numbers) < 1 or self.warmup < 0 or not self.batch_sizes:
            raise UserError("batch sizes, repeats, images and threads must be at least 1, warmup at least 0")


def main() -> None:
    arguments = parse(LatencyArguments, __doc__, sys.argv[1:])
    run_dir = RunDir.open(arguments.run)
    with recorded(run_dir, "latency"):
        measure_run(run_dir, arguments)


def measure_run(run_dir: RunDir, arguments: LatencyArguments) -> None:
    """Measure, store and show."""
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    chosen = choose_network(run_dir, arguments.arch, arguments.images)
    images = chosen.images.normalised()
    resolution = chosen.network.space.resolution
    with TemporaryDirectory() as directory:
        calibration = chosen.calibration.normalised().numpy()
        models = [Model(chosen.origin, chosen.network, resolution, Path(directory), calibration=calibration)]
        for name in arguments.peers:
            network = peer(name, len(chosen.classes), images)
            models.append(Model(name, network, resolution, Path(directory), calibration=calibration))
        stamp = provenance()
        rows = [{**row, **stamp} for model in models for row in measure_model(model, images, run_dir, arguments)]
        engines = [{**row, **stamp} for row in build_ahead(models[0], run_dir, arguments)]
    figures = {"arch": str(chosen.network.arch), "rows": rows, "engines": engines}
    write_json(run_dir.latency / "latency.json", figures)
    write_csv(run_dir.latency / "latency.csv", rows)
    write_figures(arguments.json, figures)
    show(rows, engines)
    plotted = plot_latency(rows, run_dir.latency / "latency.png")
    print(f"all figures are in {run_dir.latency / 'latency.json'}{f', a plot in {plotted}' if plotted else ''}")


def peer(name: str, classes: int, images: torch.Tensor) -> torch.nn.Module:
    """A network of torchvision with random weights and the batch statistics of real images."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=classes).train()
    with torch.no_grad():
        for _ in range(30):  # statistics as of a trained network: vanishing activations would be slow subnormals
            network(images[:16])
    return network.eval()


def measure_model(
    model: Model, images: torch.Tensor, run_dir: RunDir, arguments: LatencyArguments
) -> Iterator[dict[str, Any]]:
    """A row per backend, precision and batch size: its figures, or why it did not run."""
    expected = torch_logits(model.network, images)
    macs = count_macs(model.network, images[:1])
    for name in arguments.backends:
        backend = BACKENDS[name]
        try:
            hardware = backend.describe()
        except CannotRun as reason:
            yield {"network": model.name, "backend": name, "why": str(reason)}
            continue
        for precision in arguments.precisions:
            for batch in arguments.batch_sizes:
                row = {"network": model.name, "backend": name, "precision": precision, "batch": batch, "macs": macs}
                before = memory_mib(name)
                try:
                    session = backend.open(model, precision, batch)
                    count = min(len(images), PARITY_BATCHES * batch)
                    parity = compare_logits(session_logits(session, images[:count], batch), expected[:count])
                    latency = measure(
                        session,
                        batch,
                        repeats=arguments.repeats,
                        warmup=arguments.warmup,
                        max_seconds=arguments.max_seconds,
                        warmup_seconds=arguments.warmup_seconds,
                    )
                    size = {"engine_bytes": session.engine_bytes, "memory_mib": max(0.0, memory_mib(name) - before)}
                    if arguments.profile:
                        file = f"profile-{model.name}-{name}-{precision}-b{batch}.csv"
                        layers = session.layer_times_ms(PROFILED_RUNS)
                        write_csv(run_dir.latency / file, [{"layer": layer, "ms": ms} for layer, ms in layers])
                except CannotRun as reason:
                    yield {**row, "why": str(reason)}
                    break
                yield {**row, **latency._asdict(), **parity._asdict(), **size, "hardware": hardware}


def build_ahead(model: Model, run_dir: RunDir, arguments: LatencyArguments) -> Iterator[dict[str, Any]]:
    """TensorRT-RTX engines for other machines, where it is installed but cannot run: size and time, or why not.

    `layers` are those of the network that the builder read; an engine tells its own only where it can be loaded.
    """
    name = "tensorrt-rtx"
    if name not in arguments.backends:
        return
    try:
        trt = import_package("tensorrt_rtx")
    except CannotRun:
        return
    try:
        BACKENDS[name].describe()
        return
    except CannotRun:
        pass
    sizes = sorted(arguments.batch_sizes)
    batches = (sizes[0], sizes[len(sizes) // 2], sizes[-1])
    for precision in arguments.precisions:
        onnx = model.onnx_file(precision).read_bytes()
        layers = network_layers(trt, onnx)
        for target in arguments.targets:
            row = {"backend": name, "version": trt.__version__, "precision": precision, "target": target}
            started = time.perf_counter()
            try:
                engine = build_engine(trt, onnx, batches, target)
            except CannotRun as reason:
                yield {**row, "why": str(reason)}
                continue
            seconds = time.perf_counter() - started
            if arguments.save_engines:
                file = run_dir.latency / "engines" / f"{model.name}-{precision}-{target}.engine"
                write_atomically(file, engine)
                row["file"] = str(file)
            yield {**row, "bytes": len(engine), "batches": batches, "build_seconds": seconds, "layers": layers}


def show(rows: list[dict[str, Any]], engines: list[dict[str, Any]]) -> None:
    """Print both lists as tables."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 140)
    for hardware in dict.fromkeys(row["hardware"] for row in rows if "hardware" in row):
        print(hardware)
    table = Table(
        *("network", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s"),
        *("M MACs", "MB", "max error", "top-1 same"),
    )
    for row in rows:
        if "why" in row:
            continue
        head = [row["network"], row["backend"], row["precision"], str(row["batch"])]
        times = [f"{row[name]:.3f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        table.add_row(
            *(*head, *times, f"{row['images_per_s']:,.0f}", f"{row['macs'] / 1e6:.2f}"),
            *(f"{row['engine_bytes'] / 1e6:.2f}", f"{row['max_abs_error']:.1e}", f"{row['top1_agreement']:.1%}"),
        )
    console.print(table)
    if engines:
        table = Table("engine built ahead of time", "target", "precision", "MB", "seconds")
        for row in engines:
            if "bytes" in row:
                size, seconds = f"{row['bytes'] / 1e6:.2f}", f"{row['build_seconds']:.1f}"
                table.add_row(f"{row['backend']} {row['version']}", row["target"], row["precision"], size, seconds)
        console.print(table)
    for row in (*rows, *engines):
        if "why" in row:
            names = (name for name in ("network", "backend", "target", "precision") if name in row)
            print(" ".join(str(row[name]) for name in names), f"did not run: {row['why']}")


if __name__ == "__main__":
    run(main)
