"""Export a released network as ONNX and check it on real images.

python engine/export.py --run runs/digits
python engine/export.py --run runs/digits --precision fp32 fp16 bf16 int8 --input uint8
python engine/export.py --run runs/digits --arch ARCH

Without --arch the network that retraining left in the run is exported, and checked on test images; with it, that
architecture with the weights it inherits from the supernet, checked on search-validation images. INT8 takes its ranges
from search-validation images.
"""

import json
import sys
from dataclasses import dataclass, replace
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

from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.int8 import Calibration, quantize_onnx
from bsnas.engine.release.onnx import (
    Input,
    OnnxFormat,
    Precision,
    compare_logits,
    export_onnx,
    onnx_logits,
    torch_logits,
    typed_logits,
)
from bsnas.engine.release.released import RealImages, ReleasedNetwork, inherited, retrained
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.cost import CostModel

MOST_LOST = 0.5
"""Points of top-1 that a precision may lose before it is said."""


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    run: Path
    """Run directory with a retrained network, or with a trained supernet when --arch is given."""
    arch: str | None = None
    """Architecture to export with inherited weights instead of the retrained network."""
    precision: tuple[Precision, ...] = ("fp32",)
    """Types of weights and activations, a file each."""
    calibrate: Calibration = "minmax"
    """How INT8's ranges follow from the calibration images: minmax, entropy or percentile."""
    calibration_images: int = 512
    """Most search-validation images that INT8 is calibrated on."""
    input: Input = "normalised"
    """`normalised`: float32 [N, 3, H, W]. `uint8`: raw pixels [N, H, W, 3], normalised inside the network."""
    batch: int | None = None
    """Fixed batch size; dynamic when not given."""
    images: int = 2000
    """Most images that the file is checked on, evenly spaced over the set."""
    output: Path | None = None
    """File to write, for one precision; by default export/NAME.onnx in the run directory."""
    json: Path | None = None
    """File for the figures of this export."""

    def __post_init__(self) -> None:
        if self.images < 1 or (self.batch is not None and self.batch < 1):
            raise UserError(f"images {self.images}, batch {self.batch}: both must be at least 1")
        if not self.precision or (self.output is not None and len(self.precision) > 1):
            raise UserError("--output names one file; give one --precision with it, and at least one without")
        if self.calibration_images < 1:
            raise UserError(f"calibration images {self.calibration_images}; at least 1 is needed")


def main() -> None:
    arguments = parse(ExportArguments, __doc__, sys.argv[1:])
    with recorded(RunDir.open(arguments.run), "export"):
        figures = export(arguments)
    write_figures(arguments.json, figures)


def export(arguments: ExportArguments) -> dict[str, Any]:
    """Write and check a file per precision. Returns the figures of --json: the first file's, and all under `files`."""
    run_dir = RunDir.open(arguments.run)
    released = retrained(run_dir) if arguments.arch is None else inherited(run_dir, arguments.arch)
    images = released.test_images(arguments.images)
    files = [export_one(run_dir, released, images, arguments, precision) for precision in arguments.precision]
    return {**files[0], "files": files}


def export_one(
    run_dir: RunDir, released: ReleasedNetwork, images: RealImages, arguments: ExportArguments, precision: Precision
) -> dict[str, Any]:
    """Write one file, check it, say so, and return its figures."""
    network = released.network
    outside: dict[str, Any] = {"precision": precision, "input": arguments.input, "batch": arguments.batch}
    format = OnnxFormat(
        resolution=network.space.resolution, channels=network.space.input_channels, mean=images.mean, std=images.std,
        **outside,
    )  # fmt: skip
    batch = f"-b{format.batch}" if format.batch else ""
    file = arguments.output or run_dir.export / f"{released.origin}-{precision}-{format.input}{batch}.onnx"
    macs, params = CostModel(network.space).macs_and_params(network.arch)
    facts = {"arch": str(network.arch), "weights": released.origin, "macs": macs, "params": params}
    metadata = {
        "classes": json.dumps(released.data.classes),
        "resize": json.dumps(released.data.config.resize),
        **{name: str(fact) for name, fact in facts.items()},
    }
    if precision == "int8":
        calibration = released.calibration_images(arguments.calibration_images).inputs(format.input)
        with TemporaryDirectory() as directory:
            source = Path(directory) / "fp32.onnx"
            export_onnx(network, source, replace(format, precision="fp32"), metadata)
            quantize_onnx(source, file, calibration, calibration=arguments.calibrate)
    else:
        export_onnx(network, file, format, metadata)
    size = file.stat().st_size
    print(f"wrote {file}: {size / 1e6:.2f} MB, {macs / 1e6:.2f} M MACs, {params / 1e6:.3f} M parameters")
    return {"file": str(file), "bytes": size, **facts, **outside, **check(network, images, file, format)}


def check(network: Subnet, images: RealImages, file: Path, format: OnnxFormat) -> dict[str, Any]:
    """Compare the file with torch in fp32 on the same images; say it and return the figures.

    ONNX Runtime runs the file. Where it has no such type, torch computes what the file says in that type.
    """
    by = "ONNX Runtime"
    expected = torch_logits(network, images.normalised())
    figures: dict[str, Any] = {}
    try:
        logits = onnx_logits(file, images.inputs(format.input))
    except UserError as reason:
        by = f"torch in {format.precision}"
        figures["not_checked"] = str(reason)
        print(f"{reason}")
        logits = typed_logits(network, images.normalised(), format.precision)
    parity = compare_logits(logits, expected)
    top1_torch, top1_onnx = (float((answer.argmax(1) == images.labels).mean()) for answer in (expected, logits))
    lost = 100 * (top1_torch - top1_onnx)
    print(
        f"{by} against torch on {parity.images} images: max error {parity.max_abs_error:.2e}, "
        f"top-1 agreement {parity.top1_agreement:.2%}, top-1 {top1_onnx:.4f} against {top1_torch:.4f}"
        f"{f', which loses {lost:.2f} points' if lost > MOST_LOST else ''}"
    )
    return {
        **parity._asdict(),
        "top1_onnx": top1_onnx,
        "top1_torch": top1_torch,
        "top1_points_lost": lost,
        "checked_by": by,
        **figures,
    }


if __name__ == "__main__":
    run(main)
