"""What a check finds out about an image; and a file of what is known, whose lines survive the end of the work.

A process that is killed leaves at most one torn line, which is not read. A line holds for a file as long as its stamp
(size and modification time) does.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from bsnas.engine.host.atomic import write_error
from bsnas.engine.host.tsv import escape, unescape

FLUSH_EVERY = 256
"""Lines between two flushes: what a killed process may have to do again."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """A decodable image."""

    size: int
    """Bytes."""
    height: int
    width: int
    channels: int
    """Of the file, before it is converted to what training asks for."""
    kind: str
    """Name of its format, as `JPEG`, whatever its suffix says."""
    digest: str
    """First 16 bytes of its SHA-256 in hexadecimal digits."""


@dataclass(frozen=True)
class Fault:
    """Why an image cannot be used, so that `NAME REASON` reads as a sentence."""

    reason: str


Outcome = ImageFacts | Fault


class KnownOutcomes:
    """A file of outcomes by (name, stamp). Use it as a context; one process at a time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, tuple[str, Outcome]] = {}
        self._handle: IO[str] | None = None
        self._unflushed = 0
        if file.is_file():
            self._load()

    def find(self, name: str, stamp: str) -> Outcome | None:
        """The outcome for a file, None when it is not known for this stamp."""
        known = self._known.get(name)
        return known[1] if known and known[0] == stamp else None

    def add(self, name: str, stamp: str, outcome: Outcome) -> None:
        self._known[name] = (stamp, outcome)
        assert self._handle is not None
        try:
            self._handle.write(_line(name, stamp, outcome))
            self._unflushed += 1
            if self._unflushed >= FLUSH_EVERY:
                self.flush()
        except OSError as error:
            raise write_error(self.file, error) from None

    def flush(self) -> None:
        assert self._handle is not None
        self._handle.flush()
        self._unflushed = 0

    def _load(self) -> None:
        with open(self.file, encoding="utf-8", errors="surrogateescape", newline="\n") as handle:
            for line in handle:
                parsed = _parse(line)
                if parsed is not None:
                    self._known[parsed[0]] = parsed[1:]

    def __enter__(self) -> "KnownOutcomes":
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            torn = self.file.is_file() and self.file.stat().st_size and not _ends_a_line(self.file)
            self._handle = open(self.file, "a", encoding="utf-8", errors="surrogateescape", newline="\n")
            if torn:
                self._handle.write("\n")
        except OSError as error:
            raise write_error(self.file, error) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def stamp_of(size: int, mtime: int) -> str:
    """What changes when a file is replaced."""
    return f"{size}:{mtime}"


def _line(name: str, stamp: str, outcome: Outcome) -> str:
    if isinstance(outcome, Fault):
        fields = [escape(name), stamp, "fault", escape(outcome.reason)]
    else:
        numbers = (outcome.size, outcome.height, outcome.width, outcome.channels)
        fields = [escape(name), stamp, "image", *map(str, numbers), outcome.kind, outcome.digest]
    return "\t".join(fields) + "\n"


def _parse(line: str) -> tuple[str, str, Outcome] | None:
    """None for a torn or foreign line."""
    fields = line[:-1].split("\t") if line.endswith("\n") else []
    match fields:
        case [name, stamp, "fault", reason]:
            return unescape(name), stamp, Fault(unescape(reason))
        case [name, stamp, "image", size, height, width, channels, kind, digest] if len(digest) == 32:
            try:
                facts = ImageFacts(
                    size=int(size), height=int(height), width=int(width), channels=int(channels), kind=kind,
                    digest=digest,
                )  # fmt: skip
            except ValueError:
                return None
            return unescape(name), stamp, facts
    return None


def _ends_a_line(file: Path) -> bool:
    with open(file, "rb") as handle:
        handle.seek(-1, os.SEEK_END)
        return handle.read(1) == b"\n"
