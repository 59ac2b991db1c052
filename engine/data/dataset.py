"""Data sets as lists of files: where they come from, which images train, score subnets, or test.

A source is an ImageFolder layout (train/CLASS/FILE and val/CLASS/FILE), whose images are checked on first use, or a
directory with the index of engine/prepare.py. The search-validation images are taken out of train/ once and recorded;
val/ is the test set, and its files are listed only by `Dataset.open_test`, so nothing that trains, shrinks or searches
can read it by accident. Needs no torch, and DALI only for images that were never checked.
"""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bsnas.engine.data.builtin import Source, prepare_source
from bsnas.engine.data.file_list import (
    FileList,
    find_classes,
    list_images,
    require_every_class,
    require_test_images,
    require_two_classes,
)
from bsnas.engine.data.folder_index import index_folder
from bsnas.engine.data.index import DataIndex, is_prepared, read_index
from bsnas.engine.data.split import default_file, is_count_or_share, load_or_create_split
from bsnas.engine.host.errors import UserError

PolicyName = Literal["none", "auto", "rand", "trivial"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images, how they are split, and how they are decoded and augmented."""

    source: Source = "digits"
    """digits: scikit-learn's, embedded; fashion-mnist: Debian's package or a download; cifar10: a download; folder: see
    `path`."""
    path: str | None = None
    """Directory of train/CLASS/IMAGE and val/CLASS/IMAGE, or one made by engine/prepare.py (source folder only)."""
    resolution: int = 16
    """Height and width in pixels of the images that the network sees."""
    resize: int | None = None
    """Evaluation: shorter side in pixels before the centre crop; none resizes both sides to `resolution` exactly."""
    channels: int = 3
    """Channels of the images that the network sees: 1 converts to gray, 3 to colour, others must be in the files."""
    max_broken: float = 0.01
    """Share of images that may be unusable; they are set aside, and more than that is refused."""
    val_per_class: int | float = 20
    """Images per class held out of train/ as the search-validation set: a count, or a share if below 1."""
    split_seed: int = 0
    """Seed of the search-validation split."""
    augment: Literal["resized-crop", "pad-crop", "none"] = "pad-crop"
    """resized-crop: random area and aspect ratio; pad-crop: shift by up to `pad` pixels; none: as in evaluation."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest share of the image area that a resized crop keeps."""
    antialias: bool = True
    """Filter what a resized crop shrinks, as torchvision does; without, plain bilinear, which is faster on a CPU."""
    pad: int = 2
    """Zero pixels on each side before the random crop of pad-crop."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    policy: PolicyName = "none"
    """auto: AutoAugment's policy for ImageNet; rand: RandAugment; trivial: TrivialAugment; none."""
    rand_operations: int = 2
    """RandAugment: operations per image."""
    rand_magnitude: int = 9
    """RandAugment: strength of every operation, 0 to 30."""
    erase: float = 0.0
    """Share of the training images of which a random rectangle is set to the mean (random erasing)."""
    mixup: float = 0.0
    """Mixup: alpha of the Beta distribution of its shares; 0 is off. With `cutmix`, each gets half of the batches."""
    cutmix: float = 0.0
    """CutMix: alpha of the Beta distribution of its areas; 0 is off."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Mean of the channels, in units of 0 to 1; one value stands for all."""
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    """Standard deviation of the channels, in units of 0 to 1; one value stands for all."""
    threads: int = 0
    """Decoding threads per process; 0 divides the available cores by the processes on this machine."""
    prefetch: int = 0
    """Batches that a pipeline decodes ahead; 0 takes two on a CPU, three on a GPU. On a CPU two pipelines take turns
    where there are two threads and two batches ahead."""
    cpu_decode_share: float = 0.0
    """GPU only: share of training images that the CPU decodes, where nvJPEG is the bottleneck and cores are idle."""
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
            ("channels", 1),
            ("pad", 0),
            ("threads", 0),
            ("prefetch", 0),
            ("rand_operations", 1),
            ("rand_magnitude", 0),
            ("mixup", 0),
            ("cutmix", 0),
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
        if not is_count_or_share(self.val_per_class):
            raise UserError(
                f"val_per_class is {self.val_per_class}; give a whole number of at least 1, or a share between 0 and 1"
            )
        for name in ("max_broken", "erase", "cpu_decode_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be a share between 0 and 1")
        if self.rand_magnitude > 30 or self.rand_operations > 8:
            raise UserError(
                f"rand_magnitude {self.rand_magnitude} and rand_operations {self.rand_operations}: the strongest is "
                "30, the most are 8"
            )
        if self.policy != "none" and self.channels != 3:
            raise UserError(
                f"policy {self.policy} changes colours, which images of {self.channels} channels lack; set policy none"
            )
        if {len(self.mean), len(self.std)} - {1, self.channels} or min(self.std) <= 0:
            raise UserError(
                f"mean and std need one value or one per channel ({self.channels}), and std must be positive"
            )

    @property
    def cache(self) -> Path:
        """The cache directory, with ~ expanded."""
        return Path(self.cache_dir).expanduser()

    @property
    def scale(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation, a value per channel."""
        mean, std = (values * self.channels if len(values) == 1 else values for values in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Class names, training files and search-validation files; the test files only on request."""

    root: Path
    classes: tuple[str, ...]
    everything: FileList
    """All files of train/, those of the search-validation set included: what a stand-alone network trains on."""
    search_val_places: npt.NDArray[np.int64]
    """Positions of the search-validation files in `everything`, ascending."""
    split_file: Path
    """Where the split is recorded."""
    fingerprint: str
    """Hash of the data set and its split; equal for equal files, classes, seed and n per class."""
    config: DataConfig
    index: DataIndex | None
    """The index of a prepared directory."""

    @cached_property
    def train(self) -> FileList:
        """The files that train the supernet."""
        held_out = np.zeros(len(self.everything), bool)
        held_out[self.search_val_places] = True
        return self.everything.subset(np.flatnonzero(~held_out))

    @cached_property
    def search_val(self) -> FileList:
        """The files that score subnets."""
        return self.everything.subset(self.search_val_places)

    def open_test(self) -> FileList:
        """List val/, the test set. Only the final test of a retrained network calls this."""
        files = open_part(self.config, self.root, self.classes, self.index, "val")
        _require_test_images(len(files), self.root)
        return files


def open_dataset(config: DataConfig, split_file: Path | None = None) -> Dataset:
    """Make the source ready, list train/ and take the recorded search-validation split out of it.

    `split_file` (default: in the cache) is written when missing and checked when present. Images that were never seen
    are decoded once; what fails is set aside. Any number of processes may call this at once. Raises UserError for a
    wrong path, empty or unknown classes, too few images for the split, too many that do not decode, or a data set or
    seed that differs from the record.
    """
    root = prepare_source(config.source, config.path, config.cache)
    index = read_index(root) if is_prepared(root) else None
    classes = index.classes if index else find_classes(root)
    everything = open_part(config, root, classes, index, "train")
    require_every_class(root / "train", classes, everything.labels.tolist())
    if index:
        require_two_classes(classes, root)
        _require_test_images(index.images["val"], root)
    else:
        require_test_images(root / "val", classes)  # what retraining needs at its end
    per_class, seed = config.val_per_class, config.split_seed
    where = split_file or default_file(config.cache, root, per_class, seed)
    made = root / index.split["file"] if index and index.split.get("seed") == seed else None
    split = load_or_create_split(where, root, classes, everything, per_class=per_class, seed=seed, made=made)
    return Dataset(
        root=root,
        classes=classes,
        everything=everything,
        search_val_places=split.indices,
        split_file=split.file,
        fingerprint=split.fingerprint,
        config=config,
        index=index,
    )


def _require_test_images(count: int, root: Path) -> None:
    if not count:
        raise UserError(f"{root} holds no test images; put some into val/CLASS/")


def open_part(config: DataConfig, root: Path, classes: tuple[str, ...], index: DataIndex | None, part: str) -> FileList:
    """The decodable images of train/ or val/."""
    if index is None:
        return index_folder(
            root / part,
            list_images(root / part, classes),
            config.cache / "checked",
            channels=config.channels,
            threads=config.threads or len(os.sched_getaffinity(0)),
            max_broken=config.max_broken,
        )
    if index.channels != config.channels:
        raise UserError(
            f"{root} was prepared for {index.channels} channels, the data have {config.channels}; prepare it with "
            f"--channels {config.channels}, or set --data.channels {index.channels}"
        )
    return index.part(part)
