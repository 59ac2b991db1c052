"""Data sets as lists of files: where they come from, which images train, score subnets, or test.

Every source becomes one ImageFolder layout (train/CLASS/FILE and val/CLASS/FILE). The search-validation
images are taken out of train/ once and recorded; val/ is the test set, and its files are listed only by
`Dataset.open_test`, so nothing that trains, shrinks or searches can read it by accident. Needs neither torch
nor DALI.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from engine.errors import UserError
from engine.image_files import FileList, find_classes, list_images
from engine.sources import Source, prepare_source
from engine.split import default_file, load_or_create_split


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, and how they are decoded and augmented."""

    source: Source = "digits"
    """digits: scikit-learn's, embedded; fashion-mnist: Debian's package or a download; folder: see `path`."""
    path: str | None = None
    """Directory that holds train/CLASS/IMAGE and val/CLASS/IMAGE (source "folder" only)."""
    resolution: int = 16
    """Height and width in pixels of the images that the network sees."""
    resize: int | None = None
    """Evaluation: shorter side in pixels before the centre crop; none resizes both sides to `resolution` exactly."""
    val_per_class: int = 20
    """Images per class that are held out of train/ as the search-validation set."""
    split_seed: int = 0
    """Seed of the search-validation split."""
    augment: Literal["resized-crop", "pad-crop", "none"] = "pad-crop"
    """resized-crop: random area and aspect ratio; pad-crop: shift by up to `pad` pixels; none: as in evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image area that a resized crop keeps."""
    pad: int = 2
    """Zero pixels on each side before the random crop of pad-crop."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of the red, green and blue channels, in units of 0 to 1."""
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)
    """Standard deviation of the channels, in units of 0 to 1."""
    threads: int = 0
    """Decoding threads per process; 0 divides the available cores by the processes on this machine."""
    prefetch: int = 2
    """Batches that are decoded ahead."""
    cache_dir: str = "~/.cache/bsnas"
    """Directory for the embedded data sets, recorded splits, and decoded evaluation sets."""

    def __post_init__(self) -> None:
        if self.source == "folder" and not self.path:
            raise UserError("source folder needs a path; give the directory that holds train/ and val/")
        if self.source != "folder" and self.path:
            raise UserError(
                f"path {self.path} goes with source folder only, not with {self.source}; set the source to folder"
            )
        for name, smallest in (
            ("resolution", 1),
            ("val_per_class", 1),
            ("pad", 0),
            ("threads", 0),
            ("prefetch", 1),
        ):
            if getattr(self, name) < smallest:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {smallest}")
        if self.resize is not None and self.resize < self.resolution:
            raise UserError(f"resize {self.resize} is below resolution {self.resolution}; make it at least as large")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(
                f"crop_scale is {self.crop_scale}; it must be two shares of the area with 0 < low <= high <= 1"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError("mean and std need three values each, and std must be positive")

    @property
    def cache(self) -> Path:
        """The cache directory, with ~ expanded."""
        return Path(self.cache_dir).expanduser()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Class names, training files and search-validation files; the test files only on request."""

    root: Path
    classes: tuple[str, ...]
    train: FileList
    search_val: FileList
    split_file: Path
    """Where the split is recorded."""
    fingerprint: str
    """Hash of the data set and its split; equal for equal files, classes, seed and n per class."""

    def open_test(self) -> FileList:
        """List val/, the test set. Only the final test of a retrained network calls this."""
        return list_images(self.root / "val", self.classes)


def open_dataset(config: DataConfig, split_file: Path | None = None) -> Dataset:
    """Make the source ready, list train/ and take the recorded search-validation split out of it.

    `split_file` (default: in the cache) is written when missing and checked when present. Any number of
    processes may call this at once. Raises UserError for a wrong path, empty or unknown classes, too few
    images for the split, or a data set or seed that differs from the record.
    """
    root = prepare_source(config.source, config.path, config.cache)
    classes = find_classes(root)
    everything = list_images(root / "train", classes)
    per_class, seed = config.val_per_class, config.split_seed
    where = split_file or default_file(config.cache, root, per_class, seed)
    split = load_or_create_split(where, root, classes, everything, per_class=per_class, seed=seed)
    held_out = np.zeros(len(everything), bool)
    held_out[split.indices] = True
    return Dataset(
        root=root,
        classes=classes,
        train=everything.subset(np.flatnonzero(~held_out)),
        search_val=everything.subset(np.flatnonzero(held_out)),
        split_file=split.file,
        fingerprint=split.fingerprint,
    )
