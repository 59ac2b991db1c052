"""A CSV (or TSV) file of paths and labels, and a part where there is a third column."""

import codecs
import csv
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bsnas.engine.data.checking.outcomes import stamp_of
from bsnas.engine.data.contents import read_file
from bsnas.engine.data.preparing.formats.sample import (
    EVERYTHING,
    PARTS,
    TEST_LEFT_OUT,
    ClassNames,
    Item,
    LeftOut,
    Problem,
    Sample,
    sample_name,
    take_test_for_val,
)
from bsnas.engine.host.errors import UserError

PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category")
PART_COLUMNS = ("split", "part", "set", "subset")


class CsvReader:
    """Rows of path, label and maybe part; paths are relative to the file's directory."""

    def __init__(self, file: Path, classes: tuple[str, ...] | None) -> None:
        """Raises UserError for a file without rows, or without columns that can be told apart."""
        self._file, self._classes = file, ClassNames(classes)
        try:
            text = _decoded(file.read_bytes())
            delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
            rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
        except (OSError, UnicodeError, csv.Error) as error:
            raise UserError(f"{file} cannot be read: {error}; give a CSV file of path and label") from None
        if not rows:
            raise UserError(f"{file} holds no rows; give a CSV file of path and label")
        self._columns, self._first = _columns(file, rows[0])
        self._rows = rows[self._first :]
        place = self._columns[2]
        named = {
            PARTS.get(row[place].strip().lower(), "") for row in self._rows if place is not None and place < len(row)
        }
        self._used = take_test_for_val(named)
        self.total_bytes = sum(self._size(row) for row in self._rows)

    def samples(self) -> Iterator[Item]:
        seen: dict[str, tuple[int, str]] = {}
        for number, row in enumerate(self._rows, self._first + 1):
            found = self._sample(number, row)
            if isinstance(found, Sample) and found.file in seen:
                line, name = seen[found.file]
                same = name == found.name
                yield Problem(
                    f"line {number}: {row[self._columns[0]]}",
                    f"is listed in line {line} already"
                    + ("" if same else f", with another label: {name.split('/')[0]}"),
                )
            else:
                if isinstance(found, Sample) and found.file is not None:
                    seen[found.file] = (number, found.name)
                yield found

    def _sample(self, number: int, row: list[str]) -> Item:
        path_column, label_column, part_column = self._columns
        if len(row) <= max(column for column in self._columns if column is not None):
            return Problem(f"line {number}", f"has {len(row)} columns")
        path, part = row[path_column].strip(), EVERYTHING
        if part_column is not None:
            named = PARTS.get(row[part_column].strip().lower())
            if named is None:
                return Problem(
                    f"line {number}: {path}", f"names the part {row[part_column]!r}; give train, val or test"
                )
            if named not in self._used:
                return LeftOut(TEST_LEFT_OUT)
            part = self._used[named]
        try:
            class_name = self._classes.of(row[label_column])
        except KeyError as error:
            return Problem(f"line {number}: {path}", str(error.args[0]))
        full = os.path.normpath(os.path.join(self._file.parent, path))
        try:
            status = os.stat(full)
        except OSError as error:
            return Problem(f"line {number}: {path}", f"cannot be read ({error.strerror})")
        except ValueError:  # a path with a zero byte
            return Problem(f"line {number}: {path}", "is no path: it holds a zero byte")
        return Sample(
            part=part,
            name=sample_name(path, class_name),
            load=partial(read_file, full),
            stamp=stamp_of(status.st_size, status.st_mtime_ns),
            file=full,
        )

    def _size(self, row: list[str]) -> int:
        try:
            return os.stat(os.path.join(self._file.parent, row[self._columns[0]].strip())).st_size
        except (OSError, IndexError, ValueError):
            return 0


def _decoded(content: bytes) -> str:
    """UTF-8, whose other bytes are kept as names of files may hold them, or UTF-16 as spreadsheets write it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return content.decode("utf-8-sig", "surrogateescape")


def _columns(file: Path, first: list[str]) -> tuple[tuple[int, int, int | None], int]:
    """Positions of path, label and part, and the number of header rows."""
    lower = [field.strip().lower() for field in first]

    def find(names: tuple[str, ...]) -> int | None:
        return next((lower.index(name) for name in names if name in lower), None)

    path, label = find(PATH_COLUMNS), find(LABEL_COLUMNS)
    if path is not None and label is not None:
        return (path, label, find(PART_COLUMNS)), 1
    if len(first) in (2, 3) and path is None and label is None:
        return (0, 1, 2 if len(first) == 3 else None), 0
    raise UserError(
        f"{file} has the columns {', '.join(first)[:100]}; it needs a header with {PATH_COLUMNS[0]} and "
        f"{LABEL_COLUMNS[0]}, or rows of path and label alone"
    )
