"""Images that are set aside: listed by name with the reason, and too many of them refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.tsv import escape, unescape

Entry = tuple[str, str]
"""A name and the reason."""
SHOWN = 3


def write_quarantine(file: Path, entries: Sequence[Entry]) -> None:
    """One line per image: its name, a tab, the reason."""
    lines = (f"{escape(name)}\t{escape(reason)}\n" for name, reason in entries)
    write_atomically(file, "".join(lines).encode("utf-8", "surrogateescape"))


def read_quarantine(file: Path) -> list[Entry]:
    """What `write_quarantine` wrote."""
    text = file.read_text("utf-8", "surrogateescape")
    pairs = (line.split("\t", 1) for line in text.split("\n") if "\t" in line)
    return [(unescape(name), unescape(reason)) for name, reason in pairs]


def describe(entries: Sequence[Entry], total: int, place: str) -> str:
    """How many of `total` images are set aside, and the first of them."""
    first = "; ".join(f"{name} {reason}" for name, reason in entries[:SHOWN])
    more = f"; and {len(entries) - SHOWN} more" if len(entries) > SHOWN else ""
    share = len(entries) / max(total, 1)
    return f"{len(entries)} of {total} images in {place} cannot be used ({share:.2%}): {first}{more}"


def describe_left_out(counts: Mapping[str, int], place: str) -> str:
    """How many files were no image by which rule, the most frequent first."""
    shown = ", ".join(f"{count} {rule}" for rule, count in sorted(counts.items(), key=lambda rule: (-rule[1], rule[0])))
    return f"{sum(counts.values())} files in {place} are no images and left out: {shown}"


def refuse_too_many(entries: Sequence[Entry], total: int, max_broken: float, place: str, listed: Path) -> None:
    """Raises UserError when more than the share `max_broken` of `total` images is set aside."""
    if len(entries) > max_broken * total:
        raise UserError(
            f"{describe(entries, total, place)}; at most {max_broken:.2%} may be (max_broken); all are listed in "
            f"{listed}; mend or remove them, or raise max_broken"
        )
