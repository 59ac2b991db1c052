"""The index of a prepared data set: what engine/prepare.py writes and every reader of images reads.

DIRECTORY/index.json names format, classes and parts; DIRECTORY/train.tsv and val.tsv hold a line per image; images that
were set aside are in quarantine.tsv. The files are data from outside: every field is checked, nothing is executed.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.tsv import escape, unescape

FORMAT = 1
INDEX_FILE = "index.json"
PARTS = ("train", "val")
MAX_CLASSES = 1_000_000
SPOT_CHECKS = 32
"""Files whose size is compared with the index when it is opened."""


@dataclass(frozen=True, kw_only=True)
class DataIndex:
    """index.json: everything but the lines of the images."""

    root: Path
    classes: tuple[str, ...]
    channels: int
    """Channels that the images were checked for."""
    hashes: dict[str, str]
    """SHA-256 of each part's lines."""
    images: dict[str, int]
    """Images per part."""
    written_at: int
    """When it was written, in ns since 1970."""
    split: dict[str, Any]
    """`per_class`, `seed` and `file` of the search-validation split that was made."""

    def part(self, name: str) -> FileList:
        """The images of a part. Raises UserError for lines that differ from what index.json says of them."""
        return read_part(self, name)


def is_prepared(directory: Path) -> bool:
    """Whether a directory holds an index."""
    return (directory / INDEX_FILE).is_file()


def content_fingerprint(classes: Sequence[str], parts: dict[str, FileList]) -> str:
    """Hash of classes, names, labels and contents: the same wherever the images came from and lie."""
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for name in PARTS:
        digest.update(f"{name} {parts[name].identity}\n".encode())
    return digest.hexdigest()


def write_index(
    directory: Path, classes: Sequence[str], channels: int, parts: dict[str, FileList], about: dict[str, Any]
) -> None:
    """Write the parts' lines, then index.json, which makes them valid; `about` holds `split` and what is told only."""
    hashes = {}
    for name, files in parts.items():
        content = "".join(_lines(files)).encode("utf-8", "surrogateescape")
        hashes[name] = hashlib.sha256(content).hexdigest()
        write_atomically(directory / f"{name}.tsv", content)
    record = {
        "format": FORMAT,
        "classes": list(classes),
        "channels": channels,
        "images": {name: len(files) for name, files in parts.items()},
        "hashes": hashes,
        "fingerprint": content_fingerprint(classes, parts),
        **about,
    }
    write_atomically(directory / INDEX_FILE, (json.dumps(record, indent=1) + "\n").encode())


def read_index(directory: Path) -> DataIndex:
    """Read index.json. Raises UserError for one that this program did not write."""
    file = directory / INDEX_FILE
    try:
        record = json.loads(file.read_text())
        index = DataIndex(
            root=directory,
            classes=tuple(record["classes"]),
            channels=record["channels"],
            hashes={name: record["hashes"][name] for name in PARTS},
            images={name: record["images"][name] for name in PARTS},
            written_at=file.stat().st_mtime_ns,
            split=record["split"],
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise _foreign(file, f"{type(error).__name__}: {error}") from None
    if record.get("format") != FORMAT:
        raise _foreign(file, f"its format is {record.get('format')!r:.20}, not {FORMAT}")
    names = index.classes
    if not 1 <= len(names) <= MAX_CLASSES or len(set(map(str, names))) != len(names):
        raise _foreign(file, "its classes are not distinct names")
    if not all(isinstance(name, str) for name in names) or not isinstance(index.split, dict):
        raise _foreign(file, "its classes or its split are of another type")
    counts = [index.channels, *index.images.values()]
    if not all(type(count) is int and count >= 0 for count in counts) or index.channels < 1:
        raise _foreign(file, "its counts are no numbers")
    return index


def read_part(index: DataIndex, name: str) -> FileList:
    """The images of one part, each line checked."""
    file = index.root / f"{name}.tsv"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _foreign(file, str(error.strerror)) from None
    if hashlib.sha256(content).hexdigest() != index.hashes[name]:
        raise _foreign(file, f"it is not the one that {INDEX_FILE} names")
    rows = [_parse(line, index) for line in content.decode("utf-8", "surrogateescape").split("\n")[:-1]]
    if None in rows or len(rows) != index.images[name]:
        raise _foreign(file, f"line {rows.index(None) + 1 if None in rows else len(rows) + 1} cannot be read")
    names, files, numbers, digests = zip(*rows, strict=True) if rows else ((), (), (), ())  # type: ignore[arg-type]
    table = np.array(numbers, np.int64).reshape(-1, 6)
    offsets = table[:, 1].copy()
    found = FileList(
        root=index.root,
        names=names,
        files=files,
        labels=table[:, 0].copy(),
        sizes=table[:, 2].copy(),
        shapes=table[:, 3:].astype(np.int32),
        digests=np.array(digests, "S32"),
        offsets=offsets if (offsets >= 0).any() else None,
        checked_at=index.written_at,
    )
    _spot_check(found)
    return found


def _lines(files: FileList) -> list[str]:
    offsets = files.offsets if files.offsets is not None else np.full(len(files), -1)
    numbers = np.column_stack([files.labels, offsets, files.sizes, files.shapes]).tolist()
    return [
        "\t".join([escape(name), escape(file), *map(str, row), digest.decode()]) + "\n"
        for name, file, row, digest in zip(files.names, files.files, numbers, files.digests.tolist(), strict=True)
    ]


def _parse(line: str, index: DataIndex) -> tuple[str, str, list[int], str] | None:
    fields = line.split("\t")
    if len(fields) != 9 or not re.fullmatch(r"[0-9a-f]{32}", fields[8]):
        return None
    try:
        label, offset, size, height, width, channels = numbers = [int(field) for field in fields[2:8]]
    except ValueError:
        return None
    file = unescape(fields[1])
    inside = os.path.isabs(file) or ".." not in Path(file).parts
    if not inside or not 0 <= label < len(index.classes) or offset < -1 or min(size, height, width, channels) < 1:
        return None
    return unescape(fields[0]), file, numbers, fields[8]


def _spot_check(files: FileList) -> None:
    """Compare the sizes of a few files, always the same ones, with the index."""
    if files.offsets is not None:
        return
    for place in random.Random(0).sample(range(len(files)), min(SPOT_CHECKS, len(files))):
        path = files.path(place)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise UserError(
                f"{path} of the index in {files.root} cannot be read ({error.strerror}); bring it back, or run "
                "engine/prepare.py again"
            ) from None
        if size != files.sizes[place]:
            raise UserError(
                f"{path} has {size} bytes, but {files.sizes[place]} when it was indexed; run engine/prepare.py again"
            )


def _foreign(file: Path, why: str) -> UserError:
    return UserError(f"index {file} cannot be used: {why}; take one that engine/prepare.py wrote, or run it again")
