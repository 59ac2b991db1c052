"""What every reader gives: samples, or problems where there should be one."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from bsnas.engine.host.errors import UserError

PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Words that name a part of a data set, in front of a path or of a file's name."""
EVERYTHING = "all"
"""The part of a data set that has none; its test images are chosen by engine/data/preparing/preparation.py."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image that a source claims to have."""

    part: str
    """`train`, `val` or `all`."""
    name: str
    """CLASS/NAME, made of safe path components."""
    load: Callable[[], bytes]
    """Reads its encoded content. Raises OSError."""
    stamp: str
    """Changes when the content does."""
    file: str | None = None
    """Its path when it is a file of its own, None inside an archive."""

    @property
    def full_name(self) -> str:
        """PART/CLASS/NAME."""
        return f"{self.part}/{self.name}"


@dataclass(frozen=True)
class Problem:
    """Something of a source that is no sample."""

    name: str
    reason: str


class Reader(Protocol):
    """A source of samples."""

    total_bytes: int
    """Size of what `samples` reads, for the progress bar."""

    def samples(self) -> Iterator[Sample | Problem]:
        """All samples in an order that is the same at every call."""
        ...


class UniqueNames:
    """Tells apart the images of an archive that have the same name: the second becomes NAME~2."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], int] = {}

    def of(self, part: str, name: str) -> str:
        count = self._seen[part, name] = self._seen.get((part, name), 0) + 1
        if count == 1:
            return name
        path = PurePosixPath(name)
        return str(path.with_name(f"{path.stem}~{count}{path.suffix}"))


def part_of(path: str) -> str | None:
    """The part that a path names, by its first directories or its file's name; None for none."""
    for component in PurePosixPath(path).parts:
        word = re.match(r"[a-z]+", component.lower())
        if word and word[0] in PARTS:
            return PARTS[word[0]]
    return None


def sample_name(path: str, class_name: str) -> str:
    """CLASS/NAME for an image that lies at `path` in its source: parts and the class in front of it are left out."""
    components = [safe(component) for component in PurePosixPath(path).parts if component not in ("/", ".", "..")]
    own = safe(class_name)
    while len(components) > 1 and components[0].lower() in PARTS:
        components.pop(0)
    if len(components) > 1 and components[0] == own:
        components.pop(0)
    return "/".join([own, *components])


def safe(component: str) -> str:
    """A name that can be one component of a path anywhere: no separators, no control characters, not hidden."""
    text = re.sub(r"[/\\\x00-\x1f\x7f]", "_", component).strip()
    return ("_" + text[1:] if text.startswith(".") else text) or "_"


def take_test_for_val(parts: set[str]) -> dict[str, str]:
    """The part each of the named parts becomes: `test` is val where there is no val, and is left out elsewhere."""
    if "val" in parts or "test" not in parts:
        return {part: part for part in parts if part != "test"}
    return {part: "val" if part == "test" else part for part in parts}


def files_and_parts(directory: Path, files: Iterable[Path]) -> list[tuple[Path, str]]:
    """Files of a source below `directory` in the order of their paths, each with the part that it is used for."""
    named = {path: part_of(str(path.relative_to(directory))) or EVERYTHING for path in files}
    used = take_test_for_val(set(named.values()))
    return [(path, used[part]) for path, part in sorted(named.items()) if part in used]


class ClassNames:
    """Numbers of a source to names of classes."""

    def __init__(self, names: tuple[str, ...] | None) -> None:
        self.names = names

    def of(self, label: object) -> str:
        """The name of a class. Raises KeyError with the reason for a label outside of the known classes."""
        if isinstance(label, bytes):
            label = label.decode("utf-8", "replace")
        text = str(label).strip()
        if self.names is None:
            if not text or text.startswith("-"):
                raise KeyError(f"has label {text!r}, which is no class")
            return text
        if text in self.names:
            return text
        if re.fullmatch(r"-?\d+", text) and 0 <= int(text) < len(self.names):
            return self.names[int(text)]
        raise KeyError(f"has label {text[:40]!r}, which is none of the {len(self.names)} classes")


def read_class_names(lines: str, where: str) -> tuple[str, ...]:
    """One class name per line, in the order of the labels. Raises UserError for names that repeat."""
    names = tuple(line.strip() for line in lines.splitlines() if line.strip())
    if not names or len(set(names)) != len(names):
        raise UserError(f"{where} must name each class once, one per line, in the order of the labels")
    return names
