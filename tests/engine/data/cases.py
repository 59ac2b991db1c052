"""A miniature ImageFolder of smooth photograph-like JPEGs of odd sizes, and loaders over it."""

from pathlib import Path

import numpy as np
from PIL import Image

from bsnas.engine.data.dataset import DataConfig

CLASSES = ("ant", "bee", "cat")
TRAIN_PER_CLASS = 11
VAL_PER_CLASS = 4


def write_image_folder(root: Path, sizes: tuple[tuple[int, int], ...] = ((61, 47), (40, 80), (97, 33))) -> Path:
    """train/ with 11 and val/ with 4 images in each of three classes; (width, height) cycles through `sizes`."""
    rng = np.random.default_rng(0)
    for part, count in (("train", TRAIN_PER_CLASS), ("val", VAL_PER_CLASS)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
                image = coarse.resize(sizes[index % len(sizes)], Image.Resampling.BICUBIC)
                image.save(root / part / name / f"{index:02}.jpg", quality=95)
    return root


def folder_config(root: Path, cache: Path, **changes: object) -> DataConfig:
    """Configuration of such a folder: 24 pixels, two search-validation images per class, two pipelines of a
    thread each."""
    settings: dict[str, object] = {
        "source": "folder",
        "path": str(root),
        "cache_dir": str(cache),
        "resolution": 24,
        "val_per_class": 2,
        "augment": "resized-crop",
        "flip": True,
        "threads": 2,
    }
    return DataConfig(**(settings | changes))  # type: ignore[arg-type]
