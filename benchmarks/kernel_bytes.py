"""How many bytes do the Triton kernels of a training step move? Counted from their launches; needs no GPU.

    python benchmarks/kernel_bytes.py                 # mean path of Table 1, 256 images of 224x224, bf16
    python benchmarks/kernel_bytes.py --kernels       # and every kernel

The floor of a kernel is its activations, each once: what must move if only raw convolution outputs reach memory. The
floor of a block (level C) has every tensor of that list as often as the fewest kernels would. Columns:

- `moved`: every argument once, but partial weight gradients of up to half an L2 cache not at all: they are summed by a
  later kernel while they are still in it (50 MB on an H100).
- `with partials`: those too, written and read once more. What the caches do with them decides between the two.

Not counted, in either: tiles that read narrow operands again and strips that read the columns between them again, both
from L2 while a neighbour has just read them.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import argparse
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bsnas.benchmarks.parts.kernel.mean_path import mean_path
from bsnas.kernels import BlockShape

ACTIVATIONS = {"x", "y", "z", "y1", "y2", "y3", "grad", "dz2", "dx", "residual", "shortcut", "out"}
"""Kernel arguments of which every byte must move; the others are weights, statistics and partial sums."""
SUMMING = ("reduce_gradients_kernel", "_reduce_one_kernel", "prepare_weights_kernel")
"""Kernels without activations, for which there is no floor."""
HALF_L2 = 25 * 2**20


class Moved(NamedTuple):
    """Bytes of one launch."""

    moved: int
    with_partials: int
    floor: int


def bytes_moved(launch: Any) -> Moved:
    tensors: dict[str, Tensor] = {
        name: value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and name not in unused_arguments(launch)
    }
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    everything = sum(sizes.values())
    in_cache = sum(size for name, size in sizes.items() if _is_weight_partial(name) and size <= HALF_L2)
    floor = 0 if launch.name in SUMMING else sum(size for name, size in sizes.items() if name in ACTIVATIONS)
    return Moved(everything - in_cache, everything, floor)


def _is_weight_partial(name: str) -> bool:
    return name == "w_partial" or name.endswith("_partial")


def unused_arguments(launch: Any) -> set[str]:
    """Arguments that stand in for an absent one."""
    unused = set()
    if launch.arguments.get("RESIDUAL") is False:
        unused.add("residual")
    if launch.arguments.get("AFFINE") is False:  # the gradient is dy3 already
        unused |= {"y3", "coefficients"}
    if launch.arguments.get("blocks_1") == 0:
        unused |= {"expand", "expand_out", "expand_partial"}
    if launch.arguments.get("blocks_3") == 0:
        unused |= {"project_out"}
    return unused


def level_c_bytes(shape: BlockShape, batch: int, size: int, itemsize: int) -> int:
    """Floor of a training step of a block with an expansion, of activations alone.

    Forward: x -> y1 -> y2 -> y3, then y3 (and x) -> z. Backward: sums over dz, y3; dz, y3, y2 -> dz2; dz2, y2, y1 ->
    dz1; dz1, y1, x (and dz) -> dx.
    """
    pixels, out_pixels = size**2, (-(-size // shape.stride)) ** 2
    x, y1 = shape.in_channels * pixels, shape.hidden * pixels
    y2, y3 = shape.hidden * out_pixels, shape.out_channels * out_pixels
    forward = (x + y1) + (y1 + y2) + (y2 + y3) + (2 * y3 + (x if shape.residual else 0))
    backward = 2 * y3 + (2 * y3 + 2 * y2) + (2 * y2 + 2 * y1) + (2 * y1 + 2 * x + (y3 if shape.residual else 0))
    return (forward + backward) * batch * itemsize


def count(batch: int, resolution: int, kernels: bool) -> list[dict[str, Any]]:
    """A row per block, after those of its kernels where asked for."""
    from bsnas.kernels.tools.ahead_of_time import block_launches

    rows = []
    for index, (shape, size) in enumerate(mean_path(resolution)):
        block = (
            f"block {index + 1}: {shape.in_channels}-{shape.hidden}-{shape.out_channels} k{shape.kernel} {size}x{size}"
        )
        launches = block_launches(shape, batch, size, torch.bfloat16)
        counted = [bytes_moved(launch) for launch in launches]
        if kernels:
            rows += [
                row(block, launch.name.removesuffix("_kernel"), found)
                for launch, found in zip(launches, counted, strict=True)
                if found.floor
            ]
        total = Moved(
            sum(c.moved for c in counted), sum(c.with_partials for c in counted),
            level_c_bytes(shape, batch, size, torch.bfloat16.itemsize),
        )  # fmt: skip
        rows.append(row(block, "all", total))
    return rows


def row(block: str, name: str, found: Moved) -> dict[str, Any]:
    return {"block": block, "kernel": name, **found._asdict(), "moved_over_floor": found.moved / found.floor,
            "with_partials_over_floor": found.with_partials / found.floor}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="images")
    parser.add_argument("--resolution", type=int, default=224, help="pixels")
    parser.add_argument("--kernels", action="store_true", help="a line per kernel too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    rows = count(args.batch, args.resolution, args.kernels)
    for r in rows:
        print(
            f"{r['block']:36}{r['kernel']:26}{r['moved'] / 2**20:9.1f} MiB, floor {r['floor'] / 2**20:8.1f} MiB, moved "
            f"{r['moved_over_floor']:.3f}, with partials {r['with_partials_over_floor']:.3f}"
        )
    blocks = [r for r in rows if r["kernel"] == "all"]
    moved, partials, floor = (sum(r[key] for r in blocks) for key in ("moved", "with_partials", "floor"))
    print(f"all blocks: moved {moved / floor:.3f} of the floor, with partials {partials / floor:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "moved_over_floor": moved / floor}, indent=1))


if __name__ == "__main__":
    main()
