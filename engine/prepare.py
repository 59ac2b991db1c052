"""Prepare a data set: check every image once, index it, split it, and write a resized copy or shards where asked.

python engine/prepare.py --source /data/mine --output /data/prepared
python engine/prepare.py --source /data/ILSVRC2012 --output /data/imagenet --resize 256
python engine/prepare.py --source list.csv --output /data/prepared --val-share 0.1 --shards 512

The source is an ImageFolder, ImageNet's original archives, a CSV file of path and label, WebDataset shards, TFRecord
files, or a Hugging Face data set in local Parquet files. Called again, it goes on, or takes in what is new. The output
goes to --data.path of engine/train.py; images that are neither resized nor in an archive stay where they are.
"""

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.data.checking.quarantine import describe, describe_left_out
from bsnas.engine.data.picture_sheet import class_sheet
from bsnas.engine.data.preparing.formats.open_source import SourceFormat, open_source
from bsnas.engine.data.preparing.preparation import QUARANTINE, Preparation, Prepared, prepare, summary
from bsnas.engine.data.preparing.stored_images import Resizing
from bsnas.engine.data.split import is_count_or_share
from bsnas.engine.host.console import hide_libraries
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures

SHEET = "samples.png"


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Prepare a data set."""

    source: Path
    """Directory of images, archives, shards, or a CSV file."""
    output: Path
    """Directory for the index and whatever else is written."""
    format: SourceFormat = "auto"
    """What the source is; auto looks."""
    classes: Path | None = None
    """File of class names, one per line in the order of the labels, for sources whose labels are numbers."""
    val_labels: Path | None = None
    """ImageNet: lines of validation file name and synset, where the devkit is missing."""
    val_share: float | None = None
    """Share of each class to take as test images, for a source that names none."""
    val_per_class: int | float = 50
    """Training images per class held out to score subnets: a count, or a share if below 1."""
    split_seed: int = 0
    """Seed of both choices."""
    channels: int = 3
    """Channels of the images that the network will see: 1 for gray, 3 for colour."""
    resize: int | None = None
    """Keep a copy of every image with this shorter side in pixels; smaller images stay as they are."""
    quality: int = 90
    """JPEG quality of the resized copy."""
    shards: int | None = None
    """Write WebDataset shards of so many MB, with DALI's index files, for network file systems."""
    max_broken: float = 0.01
    """Share of images that may be unusable; more than that is refused."""
    max_megapixels: int = 100
    """Images with more million pixels than this are set aside unread."""
    threads: int = 0
    """Threads; 0 takes one per core."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if not is_count_or_share(self.val_per_class):
            raise UserError(f"val per class is {self.val_per_class}; give a whole number or a share between 0 and 1")
        if not 0 <= self.max_broken <= 1 or (self.val_share is not None and not 0 < self.val_share < 1):
            raise UserError(f"max broken {self.max_broken}, val share {self.val_share}: give shares between 0 and 1")
        if self.channels < 1 or self.max_megapixels < 1 or self.threads < 0 or (self.shards or 1) < 1:
            raise UserError(
                f"channels {self.channels}, max megapixels {self.max_megapixels}, threads {self.threads}, shards "
                f"{self.shards}: each must be at least 1 (threads 0 for all cores)"
            )


def main() -> None:
    arguments = parse(PrepareArguments, __doc__, sys.argv[1:])
    hide_libraries()
    resizing = (
        Resizing(shorter=arguments.resize, quality=arguments.quality, channels=arguments.channels)
        if arguments.resize is not None
        else None
    )
    preparation = Preparation(
        output=arguments.output.expanduser().absolute(),
        channels=arguments.channels,
        resizing=resizing,
        shard_bytes=arguments.shards * 1_000_000 if arguments.shards else None,
        val_share=arguments.val_share,
        val_per_class=arguments.val_per_class,
        split_seed=arguments.split_seed,
        max_broken=arguments.max_broken,
        max_megapixels=arguments.max_megapixels,
        threads=arguments.threads or len(os.sched_getaffinity(0)),
    )
    source = arguments.source.expanduser().absolute()
    if source in (preparation.output, *preparation.output.parents):
        raise UserError(f"output {preparation.output} lies in the source {source}; choose another place")
    reader = open_source(
        source, arguments.format, class_file=arguments.classes,
        val_labels=arguments.val_labels,
    )  # fmt: skip
    prepared = prepare(reader, preparation)
    class_sheet(prepared.parts["train"], prepared.classes, prepared.output / SHEET)
    figures = summary(prepared)
    tell(prepared, figures, preparation)
    write_figures(arguments.json, figures)


def tell(prepared: Prepared, figures: dict[str, Any], preparation: Preparation) -> None:
    """Print the summary."""
    images, per_class = figures["images"], figures["images_per_class"]
    lines = [
        f"{images['train']} training and {images['val']} test images in {figures['classes']} classes, "
        f"{figures['bytes'] / 1e6:.1f} MB; {figures['search_validation_images']} of the training images score subnets",
        f"images per class: {per_class['min']} to {per_class['max']}, median {per_class['median']:g}; the largest "
        f"class has {figures['imbalance']:.1f} times the images of the smallest",
        "formats: " + ", ".join(f"{name} {count}" for name, count in figures["formats"].items()),
    ]
    if figures["imbalance"] > 2:
        lines.append("rarest classes: " + ", ".join(f"{n} {c}" for n, c in figures["rarest_classes"].items()))
    without = figures["classes_without_test_images"]
    if without:
        lines.append(f"{len(without)} classes have no test images: {', '.join(without[:5])}")
    if figures["test_images_also_in_train"]:
        lines.append(f"{figures['test_images_also_in_train']} test images are among the training images too")
    if figures["same_content_within_train"]:
        lines.append(f"{figures['same_content_within_train']} training images are copies of others")
    if prepared.set_aside:
        total = sum(images.values()) + len(prepared.set_aside)
        lines.append(f"{describe(prepared.set_aside, total, 'the source')}; listed in {prepared.output / QUARANTINE}")
    if prepared.left_out:
        lines.append(describe_left_out(prepared.left_out, "the source"))
    lines.append(
        f"look at {prepared.output / SHEET}; train with --data.source folder --data.path {prepared.output} "
        f"--data.val-per-class {preparation.val_per_class}"
        + (f" --data.split-seed {preparation.split_seed}" if preparation.split_seed else "")
    )
    print("\n".join(lines))


if __name__ == "__main__":
    run(main)
