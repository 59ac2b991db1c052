"""The search-validation split: images of each class held out of train/, chosen by a seed, recorded in a JSON file."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which files of train/ score subnets."""

    indices: npt.NDArray[np.int64]
    """Positions in the list of all training files, ascending."""
    file: Path
    fingerprint: str


def is_count_or_share(per_class: float) -> bool:
    """Whether a number says how many of a class are held out: a count, or a share below 1."""
    return 0 < per_class < 1 or (per_class >= 1 and per_class == int(per_class))


def count_of(per_class: float, members: int) -> int:
    """How many of the `members` of a class are held out: the count, or the share of them, rounded up."""
    return math.ceil(per_class * members) if per_class < 1 else int(per_class)


def choose(files: FileList, classes: Sequence[str], per_class: float, seed: int) -> npt.NDArray[np.int64]:
    """Positions of `per_class` files of each class (see `count_of`): those with the smallest hash of (seed, name).

    A hash instead of a random generator: the choice does not depend on the order of the listing, on library
    versions, or on files that are added to other classes.
    """
    chosen: list[int] = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(files.labels == label).tolist()
        count = count_of(per_class, len(members))
        if len(members) <= count:
            raise UserError(
                f"class {name} has {len(members)} training images, but the search-validation split takes "
                f"{count} per class and must leave some to train; add images or lower --data.val-per-class"
            )
        members.sort(key=lambda i: (hash_rank(seed, files.names[i]), files.names[i]))
        chosen.extend(members[:count])
    return np.array(sorted(chosen), np.int64)


def load_or_create_split(
    where: Path,
    root: Path,
    classes: Sequence[str],
    files: FileList,
    *,
    per_class: float,
    seed: int,
    made: Path | None = None,
) -> Split:
    """The split recorded in the file `where`; when missing, a copy of the one in `made` if that is as large, else new.

    Raises UserError when it does not fit.
    """
    expected = {
        "format": FORMAT,
        "seed": seed,
        "per_class": per_class,
        "classes": list(classes),
        "counts": np.bincount(files.labels, minlength=len(classes)).tolist(),
        "file_hash": files.content_hash,
    }
    if not where.exists():
        record = _read(made) if made is not None and made.is_file() else {}
        if record.get("per_class") != per_class:
            indices = choose(files, classes, per_class, seed)
            record = {**expected, "root": str(root), "search_val": [files.names[i] for i in indices]}
        write_atomically(where, (json.dumps(record, indent=1) + "\n").encode())
    record = _read(where)
    _check(record, expected, where, root)
    position = {name: i for i, name in enumerate(files.names)}
    try:
        indices = np.array(sorted(position[name] for name in record["search_val"]), np.int64)
    except KeyError as error:
        raise UserError(
            f"split {where} names {error.args[0]}, which {root} does not hold; delete the split file"
        ) from None
    held = np.bincount(files.labels[np.unique(indices)], minlength=len(classes))
    due = [count_of(per_class, int(members)) for members in np.bincount(files.labels, minlength=len(classes))]
    if len(indices) != held.sum() or held.tolist() != due:
        raise UserError(f"split {where} does not hold {per_class} images of each class; delete the split file")
    recorded = {**expected, "search_val": record["search_val"]}
    fingerprint = hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()
    return Split(indices=indices, file=where, fingerprint=fingerprint)


def hash_rank(seed: int, name: str) -> bytes:
    """A place for a name in a random order that depends on the seed and the name alone."""
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).digest()


def default_file(cache: Path, root: Path, per_class: float, seed: int) -> Path:
    """Where a split is recorded when no place is given: one file per (directory, n per class, seed)."""
    place = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return cache / "splits" / f"{root.name}-{place}-n{per_class}-seed{seed}.json"


def default_name(per_class: float, seed: int) -> str:
    """What the split file of a prepared directory is called."""
    return f"split-n{per_class}-seed{seed}.json"


def _read(where: Path) -> dict[str, Any]:
    try:
        record = json.loads(where.read_text())
        if not all(type(name) is str for name in record["search_val"]) or not isinstance(record["file_hash"], str):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"split file {where} cannot be read; delete it to make a new split") from None
    return record  # type: ignore[no-any-return]


def _check(record: dict[str, Any], expected: dict[str, object], where: Path, root: Path) -> None:
    for key, meaning in (
        ("seed", "split seed"),
        ("per_class", "number of images per class"),
        ("classes", "list of classes"),
        ("counts", "number of images"),
        ("file_hash", "list of files"),
    ):
        if record.get(key) != expected[key]:
            was, now = _short(record.get(key)), _short(expected[key])
            raise UserError(
                f"the {meaning} of {root} is not that of the recorded split {where} (recorded {was}, now {now}); "
                "restore it, or start anew with another split file"
            )


def _short(value: object) -> str:
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return f"{sum(value)} in {len(value)} classes"
    text = f"{len(value)}" if isinstance(value, list) else str(value)
    return text if len(text) <= 16 else text[:12] + "..."
