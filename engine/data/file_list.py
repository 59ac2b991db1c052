"""Lists of image files, with labels and what identifies each; and the walk over a directory in ImageFolder layout."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bsnas.engine.data.checking.outcomes import ImageFacts
from bsnas.engine.host.errors import UserError

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_SUFFIXES = frozenset(
    (*JPEG_SUFFIXES, ".mpo", ".png", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".webp", ".tif", ".tiff", ".jp2",
     ".j2k", ".jpx")
)  # fmt: skip
OTHER_IMAGE_SUFFIXES = frozenset(
    (".gif", ".apng", ".heic", ".heif", ".avif", ".jxl", ".jxr", ".ico", ".icns", ".tga", ".psd", ".svg", ".eps",
     ".exr", ".hdr", ".dds", ".pcx", ".sgi", ".xbm", ".xpm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
     ".raf", ".dcm", ".fits")
)  # fmt: skip
"""Of images that the decoders here do not read."""
CLUTTER = frozenset(("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"))
"""Directories that systems put beside a user's files."""
HIDDEN = "hidden or of the system"
"""Why a file is left out whose name begins with a dot, or that lies in `CLUTTER`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FileList:
    """Decodable images in a fixed order, with their labels: files, or ranges of larger files (shards)."""

    root: Path
    """Directory that `files` are relative to."""
    names: tuple[str, ...]
    """CLASS/NAME of each image, unique and sorted within a class: what splits and records refer to."""
    files: tuple[str, ...]
    """Where each image lies: a path relative to `root`, or absolute. Often the names themselves."""
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes per image."""
    shapes: npt.NDArray[np.int32]
    """Height, width and channels of each as it decodes, [N, 3]."""
    digests: npt.NDArray[np.bytes_]
    """First 16 bytes of each image's SHA-256 in hexadecimal digits, [N]."""
    offsets: npt.NDArray[np.int64] | None = None
    """First byte of each inside its file; None where every image is a file of its own."""
    checked_at: int = 0
    """When the images were checked, in ns since 1970: a file that was written later is compared with its digest."""

    @classmethod
    def of(
        cls,
        root: Path,
        names: Sequence[str],
        files: Sequence[str],
        labels: Sequence[int],
        facts: Sequence[ImageFacts],
        checked_at: int = 0,
    ) -> "FileList":
        """Images that are files of their own, from what a check found out."""
        return cls(
            root=root,
            names=tuple(names),
            files=tuple(files),
            labels=np.array(labels, np.int64),
            sizes=np.array([fact.size for fact in facts], np.int64),
            shapes=np.array([(fact.height, fact.width, fact.channels) for fact in facts], np.int32).reshape(-1, 3),
            digests=np.array([fact.digest for fact in facts], "S32"),
            checked_at=checked_at,
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def paths(self) -> list[str]:
        """Full paths, built anew at each call."""
        return [self.path(i) for i in range(len(self))]

    def path(self, index: int) -> str:
        """Full path of the file that holds one image."""
        return os.path.join(self.root, self.files[index])

    def describe(self, index: int) -> str:
        """One image for a message: its file, and its name where the file holds several."""
        return self.path(index) if self.offsets is None else f"{self.names[index]} in {self.path(index)}"

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "FileList":
        """The images at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return FileList(
            root=self.root,
            names=tuple(self.names[i] for i in chosen),
            files=tuple(self.files[i] for i in chosen),
            labels=self.labels[chosen],
            sizes=self.sizes[chosen],
            shapes=self.shapes[chosen],
            digests=self.digests[chosen],
            offsets=None if self.offsets is None else self.offsets[chosen],
            checked_at=self.checked_at,
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
        """Hash over names, labels and what the images contain."""
        digest = hashlib.sha256(self.content_hash.encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(np.ascontiguousarray(self.digests).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file that has the name of an image."""

    name: str
    """Relative to the directory that was walked: CLASS/..."""
    label: int
    size: int
    """Bytes."""
    mtime: int
    """Modification time in ns."""


@dataclass(frozen=True)
class Listing:
    """What a walk over DIRECTORY/CLASS found."""

    files: list[FoundFile] = field(default_factory=list)
    """Sorted by label and name."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Names that cannot be followed or read, each with the reason."""
    made_at: int = field(default_factory=time.time_ns)
    """When the walk began, in ns since 1970."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many files are no image, by the rule that says so."""


OUTSIDE = "outside of the class directories"
"""Why a file is left out that lies beside them."""


def is_hidden(path: str) -> bool:
    """Whether a path, or a directory on it, is hidden or a system's own: every reader of a source leaves it out."""
    return any(part in CLUTTER or (part.startswith(".") and part not in (".", "..")) for part in path.split("/"))


def unread_image(suffix: str) -> str | None:
    """The reason to set a file aside whose suffix, with its dot, is of an image that is not read; else None."""
    if suffix.lower() not in OTHER_IMAGE_SUFFIXES:
        return None
    return f"is a {suffix[1:].upper()} file by its name, which the decoder does not read; convert it to JPEG or PNG"


def rule_of(suffix: str) -> str:
    """The rule by which a file is left out whose suffix is of no image."""
    return f"named {suffix}" if suffix else "without a suffix"


def images_below(directory: Path) -> Iterator[str]:
    """The files below a directory that have the names of images and are not hidden, in no order."""
    for place, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if not is_hidden(name)]
        for name in files:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not is_hidden(name):
                yield os.path.join(place, name)


def count_files(entry: "os.DirEntry[str]") -> int:
    """How many files an entry of a directory is: itself, or all below it."""
    if not entry.is_dir(follow_symlinks=False):
        return 1
    return sum(len(files) for _, _, files in os.walk(entry.path))


def find_classes(root: Path) -> tuple[str, ...]:
    """Sorted class names: the directories in train/. val/ must be there and must hold no other class."""
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(f"{root} has no directory {part}/; a data set is train/CLASS/IMAGE and val/CLASS/IMAGE")
    names = {part: directories_in(root / part) for part in ("train", "val")}
    if not names["train"]:
        raise UserError(f"{root / 'train'} holds no class directories; it must be train/CLASS/IMAGE")
    require_two_classes(names["train"], root / "train")
    unknown = sorted(set(names["val"]) - set(names["train"]))
    if unknown:
        raise UserError(
            f"class {unknown[0]} is in {root / 'val'} but not in train/ ({len(unknown)} such); "
            "add its training images or remove it from val/"
        )
    return tuple(names["train"])


def require_two_classes(classes: Sequence[str], where: Path | str) -> None:
    """Raises UserError for a single class, which every network tells from nothing."""
    if len(classes) < 2:
        raise UserError(
            f"{where} holds one class, {', '.join(classes)}, and a classifier needs two; put the images into a "
            "directory per class, CLASS/IMAGE"
        )


def require_test_images(directory: Path, classes: Sequence[str]) -> None:
    """Raises UserError when no class directory of val/ holds a file with the name of an image. Looks for the first."""
    if any(image for name in classes for image in images_below(directory / name)):
        return
    flat = sum(os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES for entry in os.scandir(directory))
    cause = f" ({flat} lie in it without a class, as ImageNet's archive unpacks them)" if flat else ""
    raise UserError(
        f"{directory} holds no test images in class directories{cause}; sort them into val/CLASS/, or let "
        "engine/prepare.py choose some with --val-share"
    )


def list_images(directory: Path, classes: Sequence[str]) -> Listing:
    """All image files below directory/CLASS for each class in order; labels are positions in `classes`.

    Raises UserError for a class directory that cannot be read; what cannot be read below it is a problem of the
    listing.
    """
    listing = Listing()
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name not in classes and (count := count_files(entry)):
                listing.left_out[HIDDEN if is_hidden(entry.name) else OUTSIDE] += count
    status = os.stat(directory)
    top = ((status.st_dev, status.st_ino),)
    for label, name in enumerate(classes):
        if (directory / name).is_dir():
            found: list[FoundFile] = []
            _walk(directory / name, name, label, found, listing, top)
            listing.files.extend(sorted(found, key=lambda file: file.name))
    return listing


def require_every_class(directory: Path, classes: Sequence[str], labels: Sequence[int]) -> None:
    """Raises UserError for a class without any image."""
    empty = sorted(set(range(len(classes))) - set(labels))
    if empty:
        name = classes[empty[0]]
        raise UserError(
            f"class {name} has no images in {directory / name}; add some ({', '.join(sorted(IMAGE_SUFFIXES))}) "
            "or remove the class from train/ and val/"
        )


def directories_in(path: Path) -> list[str]:
    """Sorted names of the directories in one, those that are hidden left out. Raises OSError."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def _walk(
    directory: Path,
    prefix: str,
    label: int,
    found: list[FoundFile],
    listing: Listing,
    above: tuple[tuple[int, int], ...],
) -> None:
    """Add what lies below a directory; names begin with `prefix`, `above` are the directories around it."""
    try:
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in above:
            listing.problems.append((prefix, "is a symbolic link to a directory around it"))
            return
        inside = (*above, (status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    listing.left_out[HIDDEN] += count_files(entry)
                else:
                    _add(entry, f"{prefix}/{entry.name}", label, found, listing, inside)
    except OSError as error:
        if len(above) == 1:  # a whole class
            raise UserError(f"cannot read {error.filename or directory}: {error.strerror}; mend or remove it") from None
        listing.problems.append((prefix, f"cannot be read ({error.strerror})"))


def _add(
    entry: os.DirEntry[str],
    name: str,
    label: int,
    found: list[FoundFile],
    listing: Listing,
    inside: tuple[tuple[int, int], ...],
) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    try:
        if entry.is_dir():
            _walk(Path(entry.path), name, label, found, listing, inside)
        elif suffix in IMAGE_SUFFIXES:
            status = entry.stat()
            found.append(FoundFile(name=name, label=label, size=status.st_size, mtime=status.st_mtime_ns))
        elif reason := unread_image(suffix):
            listing.problems.append((name, reason))
        else:
            listing.left_out[rule_of(suffix)] += 1
    except OSError as error:
        listing.problems.append((name, f"cannot be read ({error.strerror})"))
