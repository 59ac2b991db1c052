"""How fast are subnets scored, against one after another? And are the counts the same?

python benchmarks/evaluation.py
python benchmarks/evaluation.py --cases full-360 shrunk-1000 --repeats 5 --json evaluation.json --plot evaluation.png

In one process, on the same trained weights, images and models: (a) one after another through a torch DataLoader, eager
float32 NCHW, as the public systems do; (b) the best eager way: channels_last, images cached on the device, float32 or
bfloat16, whichever is faster; and the batched evaluator. (a) and (b) run a sample of the models, for their time is
proportional to the number of models; contenders take turns in every repeat, and ratios are taken within a repeat.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import torch
from rich.console import Console
from rich.table import Table

from bsnas.benchmarks.parts.scoring.case import TRAINING_IMAGES, full_space, load_images, shrunk_space, trained_supernet
from bsnas.benchmarks.parts.scoring.measure import Case, measure_case
from bsnas.benchmarks.parts.timing.provenance import device_name, provenance
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.precision import exact_float32
from bsnas.engine.host.script import parse, run, write_figures

CaseName = Literal["full-36", "full-360", "full-1000", "shrunk-36", "shrunk-360", "shrunk-1000"]


@dataclass(frozen=True, kw_only=True)
class EvaluationArguments:
    """Measure the evaluator."""

    cases: tuple[CaseName, ...] = ("full-36", "full-360", "shrunk-360", "shrunk-1000")
    """Space and number of models."""
    resolution: int = 64
    """Height and width in pixels that the images, 28 or 8 pixels wide, are scaled up to."""
    images: int = 1000
    """Images that each model is scored on."""
    recalibration_images: int = 2000
    """Training images for recalibrated statistics; 0 leaves recalibration out."""
    repeats: int = 3
    """Times that each contender runs, after a first run that is reported apart."""
    sequential_models: int = 12
    """Models that (a) and (b) run per repeat, spread over all; 0 runs all."""
    train_steps: int = 1620
    """Training steps of the supernet, a round of fair paths every 18."""
    device: str = "cpu"
    """Device that scores."""
    bf16: bool = False
    """Score in bfloat16 too: its speed, and its ranking against float32's."""
    early: bool = True
    """Measure early decisions of the best and the worst third at 99.9 %."""
    memory_mib: int | None = None
    """Memory budget in MiB; by default the evaluator's own."""
    cache_dir: str = "~/.cache/bsnas"
    """Where the trained supernet is kept."""
    json: Path | None = None
    """File for the figures."""
    plot: Path | None = None
    """File (.png or .svg) for a plot of time against the number of models."""

    def __post_init__(self) -> None:
        if min(self.images, self.repeats, self.train_steps, self.resolution) < 1 or not self.cases:
            raise UserError(
                "images, repeats, train_steps and resolution must be at least 1, and one case must be given"
            )
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {self.device} is not there; use --device cpu")


def main() -> None:
    arguments = parse(EvaluationArguments, __doc__, sys.argv[1:])
    console = Console(stderr=True)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        exact_float32()
    pixels = arguments.resolution
    data = load_images(TRAINING_IMAGES, TRAINING_IMAGES + arguments.images, pixels)
    cache = Path(arguments.cache_dir).expanduser()
    supernet = trained_supernet(arguments.train_steps, pixels, cache, device, console)
    recalibrating = arguments.recalibration_images
    recalibration = load_images(0, recalibrating, pixels) if recalibrating else None
    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        kind, count = name.split("-")
        net = supernet if kind == "full" else supernet.shrunk(shrunk_space(full_space(pixels))).eval()
        console.print(f"{name}: {count} models x {arguments.images} images")
        case = Case(kind, int(count), net, data, recalibration, device)
        row = measure_case(case, arguments, console)
        rows.append(row)
        _show(console, row)
        figures = {**provenance(), "device": device_name(device), "torch": torch.__version__}
        write_figures(arguments.json, {**figures, "resolution": pixels, "cases": rows})
    if arguments.plot is not None:
        from bsnas.benchmarks.parts.scoring.plot import plot

        plot(rows, arguments.plot)


def _show(console: Console, row: dict[str, Any]) -> None:
    table = Table("figure", "value", show_header=False)
    for name, value in row.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)


if __name__ == "__main__":
    run(main)
