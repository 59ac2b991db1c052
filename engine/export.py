"""Export a released network as ONNX and check it on real images.

python engine/export.py --run runs/digits
python engine/export.py --run runs/digits --precision fp16 --input uint8
python engine/export.py --run runs/digits --arch ARCH

Without --arch the network that retraining left in the run is exported, and checked on test images; with it, that
architecture with the weights it inherits from the supernet, checked on search-validation images.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.chosen_network import ChosenNetwork, choose_network
from engine.cli import parse, write_figures
from engine.cost import CostModel
from engine.errors import UserError, run
from engine.journal import recorded
from engine.onnx_export import (
    Input,
    OnnxFormat,
    Precision,
    compare_logits,
    export_onnx,
    onnx_logits,
    torch_logits,
)
from engine.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    run: Path
    """Run directory with a retrained network, or with a trained supernet when --arch is given."""
    arch: str | None = None
    """Architecture to export with inherited weights instead of the retrained network."""
    precision: Precision = "fp32"
    """Type of weights and activations."""
    input: Input = "normalised"
    """`normalised`: float32 [N, 3, H, W]. `uint8`: raw pixels [N, H, W, 3], normalised inside the network."""
    batch: int | None = None
    """Fixed batch size; dynamic when not given."""
    images: int = 2000
    """Most images that the file is checked on, evenly spaced over the set."""
    output: Path | None = None
    """File to write; by default export/NAME.onnx in the run directory."""
    json: Path | None = None
    """File for the figures of this export."""

    def __post_init__(self) -> None:
        if self.images < 1 or (self.batch is not None and self.batch < 1):
            raise UserError(f"images {self.images}, batch {self.batch}: both must be at least 1")


def main() -> None:
    arguments = parse(ExportArguments, __doc__, sys.argv[1:])
    with recorded(RunDir.open(arguments.run), "export"):
        figures = export(arguments)
    write_figures(arguments.json, figures)


def export(arguments: ExportArguments) -> dict[str, Any]:
    """Write the file, check it, say so, and return the figures of --json."""
    run_dir = RunDir.open(arguments.run)
    chosen = choose_network(run_dir, arguments.arch, arguments.images)
    network, images = chosen.network, chosen.images
    format = OnnxFormat(precision=arguments.precision, input=arguments.input, batch=arguments.batch)
    file = arguments.output or run_dir.export / f"{chosen.origin}-{format.precision}-{format.input}.onnx"
    macs, params = CostModel(network.space).macs_and_params(network.arch)
    facts = {"arch": str(network.arch), "weights": chosen.origin, "macs": macs, "params": params}
    export_onnx(
        network,
        file,
        resolution=network.space.resolution,
        format=format,
        mean=images.mean,
        std=images.std,
        metadata={
            "classes": json.dumps(chosen.classes),
            "resize": json.dumps(run_dir.config().data.resize),
            **{name: str(fact) for name, fact in facts.items()},
        },
    )
    size = file.stat().st_size
    print(f"wrote {file}: {size / 1e6:.2f} MB, {macs / 1e6:.2f} M MACs, {params / 1e6:.3f} M parameters")
    return {"file": str(file), "bytes": size, **facts, **asdict(format), **check(chosen, file, format)}


def check(chosen: ChosenNetwork, file: Path, format: OnnxFormat) -> dict[str, Any]:
    """Compare ONNX Runtime on the file with torch in fp32 on the same images; say it and return the figures."""
    images = chosen.images
    expected = torch_logits(chosen.network, images.normalised())
    try:
        inputs = images.pixels if format.input == "uint8" else images.normalised().numpy()
        logits = onnx_logits(file, inputs)
    except UserError as reason:
        print(f"not checked: {reason}")
        return {"not_checked": str(reason)}
    parity = compare_logits(logits, expected)
    top1_torch, top1_onnx = (float((answer.argmax(1) == images.labels).mean()) for answer in (expected, logits))
    print(
        f"ONNX Runtime against torch on {parity.images} images: max error {parity.max_abs_error:.2e}, "
        f"top-1 agreement {parity.top1_agreement:.2%}, top-1 {top1_onnx:.4f} against {top1_torch:.4f}"
    )
    return {**parity._asdict(), "top1_onnx": top1_onnx, "top1_torch": top1_torch}


if __name__ == "__main__":
    run(main)
