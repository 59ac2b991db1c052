"""A public table: codes of networks with their costs and accuracies, and the space that they are of.

NAS-Bench-Macro (arXiv 2103.11922) and Channel-Bench-Macro publish such files. A code has a digit for each choice of its
space, in the order in which the network meets what is chosen: a cluster's channels follow its first block's choice.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named, space_names

_TRIED = 20
"""Rows that recognising a space looks at."""


class Row(NamedTuple):
    """One network of a table."""

    code: str
    macs: int
    params: int
    accuracies: tuple[float, ...] = ()
    """Test top-1 in percent of each training of it; none in a table of costs."""

    @property
    def accuracy(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)


class CodeReader:
    """Turns codes of digits into architectures of a space."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._slots: list[tuple[str, int, list[Any]]] = []
        """What a digit chooses: `channels` of a cluster or `op` of a block, which, and from what."""
        for j, (cluster, blocks) in enumerate(zip(space.clusters, space.cluster_blocks, strict=True)):
            for i in blocks:
                choices = space.block_row(i).choices
                if len(choices) > 1:
                    self._slots.append(("op", i, list(choices)))
                if i == blocks.start and len(cluster.channels) > 1:
                    self._slots.append(("channels", j, list(cluster.channels)))

    def fits(self, codes: list[str]) -> bool:
        """Whether codes are as long as there are choices, and use all of their digits and no other."""
        if not self._slots or any(len(code) != len(self._slots) or not code.isdecimal() for code in codes):
            return False
        columns = zip(*codes, strict=True)
        ranges = [(min(map(int, column)), max(map(int, column))) for column in columns]
        lowest = min(low for low, _ in ranges)
        pairs = zip(ranges, self._slots, strict=True)
        return all(low == lowest and high == lowest + len(options) - 1 for (low, high), (_, _, options) in pairs)

    def arch(self, code: str, lowest: int) -> Arch:
        """The architecture of a code whose digits count from `lowest`."""
        space = self.space
        channels = [cluster.channels[0] for cluster in space.clusters]
        ops: list[BlockOp] = [space.block_row(i).choices[0] for i in range(space.num_blocks)]
        for digit, (kind, index, options) in zip(code, self._slots, strict=True):
            chosen = options[int(digit) - lowest]
            if kind == "op":
                ops[index] = chosen
            else:
                channels[index] = chosen
        return Arch(tuple(channels), tuple(tuple(ops[blocks.start : blocks.stop]) for blocks in space.cluster_blocks))


@dataclass(frozen=True)
class PublicTable:
    """A table and the space of the package that it is of."""

    name: str
    """Of the space."""
    space: Space
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, file: Path) -> "PublicTable":
        """Raises `UserError` when the file is no such table, or of a space that the package does not have."""
        rows = _read_rows(file)
        found: list[tuple[int, str, Space]] = []
        for name in space_names():
            space = space_named(name)
            if CodeReader(space).fits([row.code for row in rows]):
                tried = cls(name, space, rows[:: max(1, len(rows) // _TRIED)])
                found.append((len(list(tried.mismatches())), name, space))
        if not found:
            raise UserError(
                f"{file} is a table of {len(rows)} codes as {rows[0].code}, which no space of the package has; "
                "give NAS-Bench-Macro's or Channel-Bench-Macro's"
            )
        _, name, space = min(found, key=lambda entry: entry[0])
        return cls(name, space, rows)

    def archs(self) -> list[Arch]:
        """The architectures of all rows, in order."""
        reader, lowest = CodeReader(self.space), int(min(digit for row in self.rows for digit in row.code))
        return [reader.arch(row.code, lowest) for row in self.rows]

    @cached_property
    def distinct(self) -> dict[Arch, Row]:
        """The different networks, each by its canonical architecture; of equal ones the canonical one's row."""
        pairs = list(zip(self.archs(), self.rows, strict=True))
        found = {arch: row for arch, row in pairs if canonical(self.space, arch) == arch}
        return found | {c: row for arch, row in pairs if (c := canonical(self.space, arch)) not in found}

    def mismatches(self) -> Iterator[tuple[Row, int, int]]:
        """Rows whose multiply-adds or parameters are not ours, with ours."""
        costs = CostModel(self.space)
        for row, arch in zip(self.rows, self.archs(), strict=True):
            macs, params = costs.macs_and_params(arch)
            if (macs, params) != (row.macs, row.params):
                yield row, macs, params


def _read_rows(file: Path) -> tuple[Row, ...]:
    try:
        data = json.loads(file.read_bytes())
        rows = tuple(row_of(code, values) for code, values in data.items())
    except OSError as error:
        raise UserError(f"table {file} cannot be read: {error.strerror}; give a public table's JSON file") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        rows = ()
    if not rows:
        raise UserError(
            f'{file} is no public table; give a JSON file of entries as "0121": {{"flops": 473277, "params": 890666}}'
        )
    return rows


def row_of(code: str, values: Mapping[str, Any]) -> Row:
    """An entry of a table's file. Raises one of several errors when it is none."""
    macs, params = values["flops"], values["params"]
    if type(macs) is not int or type(params) is not int:
        raise ValueError("flops and params are whole numbers")
    accuracies = tuple(values.get("test_acc", values.get("acc", ())))
    if any(type(accuracy) not in (int, float) or not 0 <= accuracy <= 100 for accuracy in accuracies):
        raise ValueError("accuracies are percent")
    return Row(code, macs, params, accuracies)
