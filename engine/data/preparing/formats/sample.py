"""What every reader gives: samples, or problems where there should be one."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from bsnas.engine.data.file_list import HIDDEN, is_hidden
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


@dataclass(frozen=True)
class LeftOut:
    """Files of a source that are no images, by a stated rule."""

    rule: str
    """As `named .txt`."""
    count: int = 1


Item = Sample | Problem | LeftOut


class Reader(Protocol):
    """A source of samples."""

    total_bytes: int
    """Size of what `samples` reads, for the progress bar."""

    def samples(self) -> Iterator[Item]:
        """All that it holds, in an order that is the same at every call: each once, as one of the three."""
        ...


class UniqueNames:
    """Tells apart images that have the same name: the second becomes NAME~2."""

    def __init__(self, output: Callable[[str, str], str]) -> None:
        """`output`: what of a part and a name must differ."""
        self._output = output
        self._taken: set[str] = set()
        self._counts: dict[tuple[str, str], int] = {}

    def of(self, part: str, name: str) -> str:
        path, found = PurePosixPath(name), name
        while (output := self._output(part, found)) in self._taken:
            count = self._counts[part, name] = self._counts.get((part, name), 1) + 1
            found = str(path.with_name(f"{path.stem}~{count}{path.suffix}"))
        self._taken.add(output)
        return found


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


TEST_LEFT_OUT = "of the part test, where val is there"


def files_and_parts(directory: Path, files: Iterable[Path]) -> tuple[list[tuple[Path, str]], list[LeftOut]]:
    """Files of a source below `directory` in the order of their paths, each with the part that it is used for; and
    what is left out of them."""
    named: dict[Path, str] = {}
    left: list[LeftOut] = []
    for path in files:
        below = str(path.relative_to(directory))
        if is_hidden(below):
            left.append(LeftOut(HIDDEN))
        else:
            named[path] = part_of(below) or EVERYTHING
    used = take_test_for_val(set(named.values()))
    left += [LeftOut(TEST_LEFT_OUT) for part in named.values() if part not in used]
    return [(path, used[part]) for path, part in sorted(named.items()) if part in used], left


class ClassNames:
    """Numbers of a source to names of classes."""

    def __init__(self, names: tuple[str, ...] | None) -> None:
        self.names = names
        self._by_directory: dict[str, str] = {}

    def of(self, label: object) -> str:
        """The name of a class. Raises KeyError with the reason for a label outside of the known classes, or whose
        directory would be that of another class."""
        name = self._name(label)
        other = self._by_directory.setdefault(safe(name), name)
        if other != name:
            raise KeyError(f"has label {name!r}, whose directory {safe(name)} is that of label {other!r}; rename one")
        return name

    def _name(self, label: object) -> str:
        if label is None or label != label:  # not a number
            raise KeyError("has no label")
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
