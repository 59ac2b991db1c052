"""What does each augmentation cost the training loader on this device, and does it give the CPU's pixels?

python benchmarks/loader_augmentations.py
python benchmarks/loader_augmentations.py --cases crop erase all --precision fp16 --json augmentations.json

On generated photographs (benchmarks/parts/loading/photographs.py), with the GPU's decoder where there is a GPU. Cases
take turns in every round; figures are medians over rounds, ratios to the plain crop are taken within a round. On a GPU
the first batch of each, before it is timed, is compared with the same one from the CPU in fp32.
"""

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bsnas.benchmarks.parts.loading.photographs import write_photographs
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.config import Precision
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.host.console import hide_libraries
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.presets import preset
from bsnas.engine.runs.commands import hardware

CaseName = Literal["crop", "erase", "auto", "rand", "trivial", "mixup", "cutmix", "all", "cpu-decode"]
CASES: dict[CaseName, dict[str, Any]] = {
    "crop": {},
    "erase": {"erase": 0.25},
    "auto": {"policy": "auto"},
    "rand": {"policy": "rand"},
    "trivial": {"policy": "trivial"},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
    "all": {"erase": 0.25, "policy": "rand", "mixup": 0.2, "cutmix": 1.0},
    "cpu-decode": {"cpu_decode_share": 0.25},
}
"""Settings over the random crop and flip that all cases have; the last needs a GPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WARMUP_BATCHES = 6  # more than a loader holds ready


@dataclass(frozen=True, kw_only=True)
class AugmentationArguments:
    """Measure the loader's augmentations."""

    cases: tuple[CaseName, ...] = tuple(CASES)
    """Augmentations; the plain crop, which all are compared with, always runs. cpu-decode is left out on a CPU."""
    precision: Precision | None = None
    """Type of the batches; by default that of training: bf16 on a GPU, fp32 on a CPU."""
    images: int = 512
    """Photographs to generate."""
    batch_size: int = 64
    """Images per batch."""
    batches: int = 60
    """Timed batches per case and round."""
    rounds: int = 3
    """Rounds, in each of which every case runs once."""
    resolution: int = 224
    """Height and width in pixels of the images that the network sees."""
    threads: int = 0
    """Decoding threads; 0 takes what training would take."""
    cache_dir: str = "~/.cache/bsnas"
    """Where the photographs are kept."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.batches, self.rounds) < 1 or self.images < 2 * self.batch_size:
            raise UserError(
                f"{self.images} images, batches of {self.batch_size}, {self.batches} batches, {self.rounds} rounds: "
                "each must be at least 1, and the images twice a batch"
            )


def main() -> None:
    arguments = parse(AugmentationArguments, __doc__, sys.argv[1:])
    hide_libraries()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    place = {"device": hardware(device), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    figures = measure(arguments, device, DTYPES[precision])
    write_figures(arguments.json, {**provenance(), **place, "precision": precision, "cases": figures})
    show(figures, f"{arguments.resolution}x{arguments.resolution} in {precision}, {place['device']}")


def measure(arguments: AugmentationArguments, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """The figures of each case."""
    files, base = photographs(arguments)
    names = [name for name in CASES if name in ("crop", *arguments.cases)]
    configs = {name: replace(base, **CASES[name]) for name in names if device.type == "cuda" or name != "cpu-decode"}
    # All stay: a pipeline takes seconds to build, and rests once its few batches ahead are decoded.
    loaders = {name: batches(files, config, arguments.batch_size, device, dtype) for name, config in configs.items()}
    first = {name: on_cpu(next(loader)) for name, loader in loaders.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        figures[name] = {"images_changed": share_of_different(first[name][0], first["crop"][0])}
        if device.type == "cuda":
            reference = replace(config, cpu_decode_share=0.0)
            expected = next(batches(files, reference, arguments.batch_size, torch.device("cpu"), torch.float32))
            figures[name]["grey_levels_from_cpu"] = grey_levels(first[name], expected, base)
    speeds: dict[CaseName, list[float]] = {name: [] for name in configs}
    for _ in range(arguments.rounds):
        for name, loader in loaders.items():
            speeds[name].append(images_per_s(loader, arguments.batches, device))
    for case, values in speeds.items():
        ratios = [value / crop for value, crop in zip(values, speeds["crop"], strict=True)]
        figures[case] |= {"images_per_s": median(values), "speed_against_crop": median(ratios)}
    return figures


def photographs(arguments: AugmentationArguments) -> tuple[FileList, DataConfig]:
    """Training files, and the crop, flip and normalisation of the imagenet preset."""
    cache = Path(arguments.cache_dir).expanduser()
    root = write_photographs(cache / "benchmark" / f"photographs-{arguments.images}", arguments.images)
    config = replace(
        preset("imagenet").data,
        path=str(root),
        cache_dir=str(cache),
        resolution=arguments.resolution,
        resize=None,
        val_per_class=1,
        threads=arguments.threads,
    )
    return open_dataset(config).train, config


def batches(
    files: FileList, config: DataConfig, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of the training loader."""
    loader = TrainLoader(files, config, batch_size=batch_size, seed=0, device=device, dtype=dtype)
    return (batch for epoch in count() for batch in loader.epoch(epoch))


def on_cpu(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A copy in fp32: DALI reuses the memory of a batch that it has given."""
    return batch[0].float().cpu().clone(), batch[1].cpu().clone()


def share_of_different(images: Tensor, plain: Tensor) -> float:
    """Of a batch, the images of which some pixel is not that of the plain crop."""
    return float(((images - plain).abs().flatten(1).amax(1) > 1e-3).float().mean())


def grey_levels(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], config: DataConfig) -> float:
    """Mean distance of a batch from the CPU's.

    Raises RuntimeError for values that are not finite and for other labels than the CPU's.
    """
    if not torch.isfinite(found[0]).all():
        raise RuntimeError("the loader gave values that are not finite")
    if not torch.allclose(found[1], expected[1]):
        raise RuntimeError("the loader gave other labels than on the CPU")
    scale = 255 * torch.tensor(config.scale[1])[:, None, None]
    return float(((found[0] - expected[0]).abs() * scale).mean())


def images_per_s(loader: Iterator[tuple[Tensor, Tensor]], timed: int, device: torch.device) -> float:
    """Of batches that nothing uses, after those that were ready."""
    for _ in islice(loader, WARMUP_BATCHES):
        pass
    synchronize(device)
    began = time.perf_counter()
    images = sum(len(batch) for batch, _ in islice(loader, timed))
    synchronize(device)
    return images / (time.perf_counter() - began)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(figures: dict[str, dict[str, Any]], title: str) -> None:
    table = Table("case", "images/s", "against crop", "images changed", "grey levels from the CPU", title=title)
    for name, row in figures.items():
        distance = f"{row['grey_levels_from_cpu']:.2f}" if "grey_levels_from_cpu" in row else ""
        speed = f"{row['images_per_s']:.0f}", f"{row['speed_against_crop']:.2f}"
        table.add_row(name, *speed, f"{row['images_changed']:.0%}", distance)
    Console(width=110).print(table)


if __name__ == "__main__":
    run(main)
