"""What each choice is worth on average: by a table's accuracies, and by scores. Where they differ, scores err."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsnas.benchmarks.parts.tabular.public_table import Row
from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.space import Space


def worth(space: Space, networks: Mapping[Arch, Row], scores: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each choice of a block, but its first: `block`, `choice`, and `table` and `score`, the points of top-1
    that it adds to the first one, by least squares over all networks, in which each block counts for itself.

    Scores are shares of images.
    """
    choices = [
        (block, op) for block, live in enumerate(space.live) for op in live[1:]
    ]  # channels are part of an operation
    places = {choice: column for column, choice in enumerate(choices, 1)}
    table = np.zeros((len(networks), len(choices) + 1))
    table[:, 0] = 1
    for number, arch in enumerate(networks):
        for block, op in enumerate(arch.operations):
            if (block, op) in places:
                table[number, places[block, op]] = 1
    wanted = np.column_stack([[row.accuracy for row in networks.values()], 100 * np.array(scores)])
    found = np.linalg.lstsq(table, wanted, rcond=None)[0][1:]
    return [
        {"block": block + 1, "choice": str(op), "table": float(by_table), "score": float(by_score)}
        for (block, op), (by_table, by_score) in zip(choices, found, strict=True)
    ]


def print_worth(rows: Sequence[Mapping[str, Any]], space: Space) -> None:
    """A line for each choice, beside the first of its block."""
    print("\npoints of top-1 that a choice adds to the first of its block: by the table, by the scores")
    for row in rows:
        first: Operation = space.live[row["block"] - 1][0]
        print(f"block {row['block']:2} {row['choice']:>10} against {first!s:10}{row['table']:8.2f}{row['score']:8.2f}")
