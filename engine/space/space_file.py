"""Spaces as TOML files: what `--space FILE` reads and `--show-space` writes. No torch.

    resolution = 32
    classes = 10

    [[cluster]]
    channels = [16, 24]

    [[cluster.row]]
    family = "ir"
    blocks = 2
    kernels = [3, 5]
    expansions = [3, 6]

A cluster of one row may hold the row's keys itself. Errors name the line.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster, Row, TableError, with_tuples

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NETWORK = ("resolution", "input_channels", "classes", "springs")
ROW = {field.name: field for field in fields(Row)}

_HEADER = re.compile(r"\s*\[\[?\s*([\w.\s]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*["']?([\w-]+)["']?\s*=""")

Place = tuple[int | None, int | None]
"""Positions of a cluster and of a row in it; None outside of any."""


def read_space(file: Path | str) -> Space:
    """The space of a TOML file. Raises `UserError` with file and line when it is none or no network can be built."""
    try:
        text = Path(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"space {file} cannot be read: {reason}; give a TOML file as --show-space writes it") from None
    return parse_space(text, str(file))


def parse_space(text: str, name: str) -> Space:
    """The space of TOML text that is called `name` in errors."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        what, line = (
            (f"{found[1]} in column {found[3]}", int(found[2])) if found else (str(error), text.count("\n") + 1)
        )
        raise UserError(f"{name}:{line}: this is not TOML: {what}; mend the line") from None
    return _Reader(name, text).space(data)


class _Reader:
    """Turns parsed TOML into a space, and says where what is wrong stands."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._lines: dict[tuple[Place, str], int] = {}
        """Of a key, or with the key "" of a header."""
        place: Place = (None, None)
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.fullmatch(line):
                place = self._place_after(place, re.sub(r"\s", "", header[1]))
                self._lines.setdefault((place, ""), number)
            elif key := _KEY.match(line):
                self._lines.setdefault((place, key[1]), number)

    @staticmethod
    def _place_after(place: Place, header: str) -> Place:
        cluster, row = place
        if header == "cluster":
            return (0 if cluster is None else cluster + 1), None
        if header == "cluster.row":
            return cluster, 0 if row is None else row + 1
        return place

    def error(self, message: str, place: Place, key: str) -> UserError:
        """The error at a key, or at the nearest header around where it should stand."""
        cluster, _ = place
        around: list[tuple[Place, str]] = [(place, key), ((cluster, None), key), (place, ""), ((cluster, None), "")]
        around.append(((None, None), "cluster"))  # written as an inline table
        line = next((self._lines[at] for at in around if at in self._lines), 1)
        return UserError(f"{self.name}:{line}: {message}")

    def space(self, data: Mapping[str, Any]) -> Space:
        self._check_keys(data, (*NETWORK, "cluster"), (None, None))
        given = {key: data[key] for key in NETWORK if key in data}
        clusters = self._tables(data, "cluster", (None, None))
        try:
            space = Space(table=tuple(self._cluster(j, cluster) for j, cluster in enumerate(clusters)), **given)
            space.check_strides()
        except TableError as error:
            raise self.error(str(error), (error.cluster, error.row), error.key) from None
        return space

    def _cluster(self, j: int, data: Mapping[str, Any]) -> Cluster:
        own = {key: value for key, value in data.items() if key in ROW}
        self._check_keys(data, ("channels", "row", *ROW), (j, None))
        if "channels" not in data:
            raise self.error("a cluster has no channels; give channels = [...], one number or more", (j, None), "")
        if "row" in data and own:
            first = next(iter(own))
            raise self.error(
                f"{first} stands beside rows; a cluster has rows or the keys of its only row, not both; move it into "
                "a [[cluster.row]]", (j, None), first,
            )  # fmt: skip
        rows = self._tables(data, "row", (j, None)) if "row" in data else [own]
        built = tuple(self._row(j, number if "row" in data else None, row) for number, row in enumerate(rows))
        try:
            return Cluster(channels=with_tuples(data)["channels"], rows=built)
        except TableError as error:
            raise self.error(str(error), (j, error.row), error.key) from None

    def _row(self, j: int, number: int | None, data: Mapping[str, Any]) -> Row:
        self._check_keys(data, tuple(ROW), (j, number))
        try:
            return Row(**with_tuples(data))
        except TableError as error:
            raise self.error(str(error), (j, number), error.key) from None

    def _tables(self, data: Mapping[str, Any], key: str, place: Place) -> list[Mapping[str, Any]]:
        """The tables of `[[key]]`, at least one."""
        tables = data.get(key)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise self.error(f"{key} is no list of tables; write [[cluster]], and [[cluster.row]] in it", place, key)
        return tables

    def _check_keys(self, data: Mapping[str, Any], allowed: tuple[str, ...], place: Place) -> None:
        for key in data:
            if key not in allowed:
                close = get_close_matches(key, allowed, 1)
                hint = f"did you mean {close[0]}?" if close else "take the line out"
                raise self.error(f"key {key:.40} is unknown; allowed are {', '.join(allowed)}; {hint}", place, key)


def space_text(space: Space) -> str:
    """The space as TOML; what shrinking has dropped is not said."""
    lines = [f"{key} = {_toml(getattr(space, key))}" for key in NETWORK]
    for cluster in space.table:
        lines += ["", "[[cluster]]", f"channels = {_toml(cluster.channels)}"]
        for row in cluster.rows:
            lines += ["", "[[cluster.row]]"] if len(cluster.rows) > 1 else []
            lines += [f"{key} = {_toml(getattr(row, key))}" for key, field in ROW.items() if _is_said(row, field)]
    return "\n".join(lines) + "\n"


def _is_said(row: Row, field: Field[Any]) -> bool:
    """The family always, everything else where it is not the default."""
    return field.name in ("family", "blocks", "stride") or getattr(row, field.name) != _default(field)


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
