"""How fast is the released network on this machine, and does each backend compute what torch computes?

python benchmarks/latency.py --run runs/digits --batch-sizes 1 8 32 --precisions fp32 fp16
python benchmarks/latency.py --run runs/digits --backends torch-cpu onnxruntime-cpu --peers mobilenet_v2 --profile

Time is wall clock for one batch from the call to the logits, the input already on the device. Rows of one batch size
are timed in turn, in several passes. Parity is against torch in fp32 on real images. A backend that cannot run says
why. Where TensorRT-RTX is installed but cannot run, its engines are built ahead of time for --targets, each with a list
of its layers. All rows are in latency/latency.json and .csv of the run, a plot of MACs against latency in
latency/latency.png, and with --profile a CSV of layer times per row, from runs of their own.
"""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import torch

from bsnas.benchmarks.parts.timing.latency_engines import engines_ahead
from bsnas.benchmarks.parts.timing.latency_report import plot_latency, show
from bsnas.benchmarks.parts.timing.latency_rows import Effort, Network, measure_rows
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.benchmarks.parts.timing.turns import write_csv
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.release.onnx import Precision
from bsnas.engine.release.released import inherited, retrained
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import RunDir, write_json
from bsnas.search.backends import BACKENDS, Model
from bsnas.search.backends.tensorrt import RTX_TARGETS

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
    repeats: int = 200
    """Timed runs per row."""
    passes: int = 5
    """Turns over all rows of a batch size that the timed runs are spread over: a slow spell meets all rows alike."""
    warmup_seconds: float = 0.3
    """Uncounted runs of each row, in which the device leaves its power-saving state."""
    max_seconds: float = 2.0
    """Most time for the timed runs of a row; slower networks get fewer, but three in each pass."""
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
        counts = (
            *self.batch_sizes,
            self.repeats,
            self.passes,
            self.images,
            1 if self.threads is None else self.threads,
        )
        if min(counts) < 1 or not self.batch_sizes or not self.precisions:
            raise UserError("batch sizes, repeats, passes, images and threads must be at least 1, and precisions given")
        if not (self.warmup_seconds >= 0 and self.max_seconds > 0):
            raise UserError(
                f"warmup of {self.warmup_seconds} s, at most {self.max_seconds} s: give at least 0 and more than 0"
            )

    def effort(self) -> Effort:
        return Effort(
            repeats=self.repeats,
            passes=self.passes,
            warmup_seconds=self.warmup_seconds,
            max_seconds=self.max_seconds,
        )


def main() -> None:
    arguments = parse(LatencyArguments, __doc__, sys.argv[1:])
    run_dir = RunDir.open(arguments.run)
    with recorded(run_dir, "latency"):
        measure_run(run_dir, arguments)


def measure_run(run_dir: RunDir, arguments: LatencyArguments) -> None:
    """Measure, store and show."""
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    released = retrained(run_dir) if arguments.arch is None else inherited(run_dir, arguments.arch)
    space = released.network.space
    if arguments.peers and space.input_channels != 3:
        raise UserError(
            f"peers {', '.join(arguments.peers)} take images of 3 channels, and this run's have "
            f"{space.input_channels}; leave out --peers"
        )
    images = released.test_images(arguments.images).normalised()
    calibration = released.calibration_images().normalised().numpy() if "int8" in arguments.precisions else None
    peers = {name: peer(name, len(released.data.classes), images) for name in arguments.peers}
    stamp, directory = provenance(), run_dir.latency
    with TemporaryDirectory() as files:
        models = [
            Model(name, network, space.resolution, Path(files), channels=space.input_channels, calibration=calibration)
            for name, network in {released.origin: released.network, **peers}.items()
        ]
        rows = measure_rows(
            [Network.of(model, images) for model in models],
            arguments.backends,
            arguments.precisions,
            arguments.batch_sizes,
            arguments.effort(),
            directory if arguments.profile else None,
        )
        ahead: Iterable[dict[str, Any]] = ()
        if "tensorrt-rtx" in arguments.backends:
            ahead = engines_ahead(
                models[0], arguments.precisions, arguments.targets, arguments.batch_sizes, directory / "engines"
            )
        engines = [{**row, **stamp} for row in ahead]
    rows = [{**row, **stamp} for row in rows]
    figures = {"arch": str(released.network.arch), "rows": rows, "engines": engines}
    write_json(run_dir.latency_file, figures)
    write_csv(directory / "latency.csv", rows)
    if engines:
        write_csv(directory / "engines.csv", engines)
    write_figures(arguments.json, figures)
    show(rows, engines)
    plotted = plot_latency(rows, directory / "latency.png")
    print(f"all figures are in {run_dir.latency_file}{f', a plot in {plotted}' if plotted else ''}")


def peer(name: str, classes: int, images: torch.Tensor) -> torch.nn.Module:
    """A network of torchvision with random weights and the batch statistics of real images."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=classes).train()
    with torch.no_grad():
        for _ in range(30):  # statistics as of a trained network: vanishing activations would be slow subnormals
            network(images[:16])
    return network.eval()


if __name__ == "__main__":
    run(main)
