"""Write ten classes of 32x32 JPEGs that a network learns in minutes: gratings in noise.

python benchmarks/miniatures.py --output runs/miniatures --train 50000 --test 10000

By default as many as CIFAR-10 has, for trying a whole search where nothing can be downloaded. A class is the slope and
the width of a grating's stripes; mirror images are one class, as training flips images. Phase, colours, contrast and
noise are random, so neither pixels nor colours tell the classes apart, and the noisiest images are lost: a plain
network of three convolutions is right on 90 % after four epochs over 5,000 of them.
"""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import numpy as np
from PIL import Image

from bsnas.engine.host.atomic import build_directory
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run

PIXELS = 32
CLASSES = tuple(product((0.0, 22.5, 45.0, 67.5, 90.0), (5.0, 9.0)))
"""Slope of the stripes in degrees, and their period in pixels."""
CONTRAST = (5.0, 50.0)
NOISE = (20.0, 90.0)
"""Standard deviation. Contrast and noise are in grey levels."""


@dataclass(frozen=True, kw_only=True)
class MiniatureArguments:
    output: Path
    """Directory to write; one that is there already is left as it is."""
    train: int = 50_000
    """Training images over all classes."""
    test: int = 10_000
    """Test images over all classes."""

    def __post_init__(self) -> None:
        if min(self.train, self.test) < len(CLASSES):
            raise UserError(f"train {self.train}, test {self.test}: give at least {len(CLASSES)}, one for each class")


def main() -> None:
    arguments = parse(MiniatureArguments, __doc__, sys.argv[1:])
    write_miniatures(arguments.output, train=arguments.train, test=arguments.test)
    print(f"{arguments.train} training and {arguments.test} test images are in {arguments.output}")


def miniature(rng: np.random.Generator, label: int) -> Image.Image:
    """One image of a class."""
    slope, period = CLASSES[label]
    angle = np.deg2rad(slope) * rng.choice((-1, 1))
    rows, columns = np.mgrid[:PIXELS, :PIXELS]
    across = rows * np.cos(angle) + columns * np.sin(angle)
    wave = np.sin(2 * np.pi * (across / period + rng.random()))
    colour, background = rng.uniform(0.5, 1.0, 3), rng.uniform(70, 180, 3)
    pixels = background + rng.uniform(*CONTRAST) * wave[..., None] * colour
    pixels += rng.standard_normal(pixels.shape) * rng.uniform(*NOISE)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_miniatures(directory: Path, *, train: int, test: int) -> Path:
    """train/CLASS/ and val/CLASS/ of so many images; made once."""

    def build(work: Path) -> None:
        rng = np.random.default_rng(0)
        for part, images in (("train", train), ("val", test)):
            for index in range(images):
                label = index % len(CLASSES)
                slope, period = CLASSES[label]
                folder = work / part / f"slope{slope:g}-period{period:g}"
                folder.mkdir(parents=True, exist_ok=True)
                miniature(rng, label).save(folder / f"{index:05}.jpg", quality=90)

    return build_directory(directory, build)


if __name__ == "__main__":
    run(main)
