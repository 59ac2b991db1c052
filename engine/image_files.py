"""Lists of image files in ImageFolder layout (CLASS/IMAGE), with labels and what identifies each file."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.errors import UserError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".pnm", ".webp", ".tif", ".tiff", ".jp2"))


@dataclass(frozen=True, eq=False)
class FileList:
    """Image files under one directory, in a fixed order, with their labels."""

    root: Path
    names: tuple[str, ...]
    """Paths relative to `root`, sorted."""
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes per file."""
    mtimes: npt.NDArray[np.int64]
    """Modification time per file, in ns."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[str]:
        """Full paths, built anew at each call."""
        return [self.path(i) for i in range(len(self))]

    def path(self, index: int) -> str:
        """Full path of one file."""
        return f"{self.root}/{self.names[index]}"

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "FileList":
        """The files at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        names = tuple(self.names[i] for i in chosen)
        return FileList(
            self.root,
            names,
            self.labels[chosen],
            self.sizes[chosen],
            self.mtimes[chosen],
        )

    @cached_property
    def content_hash(self) -> str:
        """Hash over names and sizes: the same for a copy of the data set elsewhere."""
        digest = hashlib.sha256()
        for name, size in zip(self.names, self.sizes.tolist(), strict=True):
            digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """Hash over directory, names, sizes, modification times and labels: changes whenever a file is replaced."""
        digest = hashlib.sha256(f"{self.root}\n{self.content_hash}".encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(self.mtimes).tobytes())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


def find_classes(root: Path) -> tuple[str, ...]:
    """Sorted class names: the directories in train/. val/ must be there and must hold no other class."""
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"{root} has no directory {part}/; a data set is train/CLASS/IMAGE and val/CLASS/IMAGE")
    names = {part: _directories(root / part) for part in ("train", "val")}
    if not names["train"]:
        raise UserError(f"{root / 'train'} holds no class directories; it must be train/CLASS/IMAGE")
    unknown = sorted(set(names["val"]) - set(names["train"]))
    if unknown:
        raise UserError(
            f"class {unknown[0]} is in {root / 'val'} but not in train/ ({len(unknown)} such); "
            "add its training images or remove it from val/"
        )
    return tuple(names["train"])


def list_images(directory: Path, classes: Sequence[str]) -> FileList:
    """All image files below directory/CLASS for each class in order; labels are positions in `classes`."""
    names: list[str] = []
    labels: list[int] = []
    stats: list[tuple[int, int]] = []
    for label, name in enumerate(classes):
        found = sorted(_walk(directory / name, name)) if (directory / name).is_dir() else []
        if not found:
            raise UserError(
                f"class {name} has no images in {directory / name}; add some ({', '.join(sorted(IMAGE_SUFFIXES))}) "
                "or remove the class from train/ and val/"
            )
        names.extend(entry[0] for entry in found)
        stats.extend(entry[1:] for entry in found)
        labels.extend([label] * len(found))
    table = np.array(stats, np.int64).reshape(-1, 2)
    return FileList(
        directory,
        tuple(names),
        np.array(labels, np.int64),
        table[:, 0].copy(),
        table[:, 1].copy(),
    )


def _directories(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _walk(directory: Path, prefix: str) -> list[tuple[str, int, int]]:
    """(name, bytes, mtime in ns) of the image files below a directory; names begin with `prefix`."""
    found: list[tuple[str, int, int]] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                name = f"{prefix}/{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    found.extend(_walk(Path(entry.path), name))
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    stat = entry.stat()
                    found.append((name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise UserError(f"cannot read {error.filename or directory}: {error.strerror}; mend or remove it") from None
    return found
