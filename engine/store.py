"""Every subnet evaluation, in one SQLite file: nothing is evaluated twice, and a killed evaluation goes on.

A row holds the counts of one architecture on the first `seen` images of an evaluation set. Rows are written in one
transaction per batch of work, so a process killed at any moment loses at most the batch that was running.
"""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError


class Tally(NamedTuple):
    """Counts over the first `seen` images of an evaluation set."""

    seen: int = 0
    correct1: int = 0
    correct5: int = 0
    loss_sum: float = 0.0

    def plus(self, other: "Tally") -> "Tally":
        return Tally(
            self.seen + other.seen,
            self.correct1 + other.correct1,
            self.correct5 + other.correct5,
            self.loss_sum + other.loss_sum,
        )


class StoreKey(NamedTuple):
    """What an evaluation depends on besides the architecture."""

    weights: str
    """Fingerprint of the supernet's weights and statistics."""
    images: str
    """Fingerprint of the evaluation set."""
    mode: str
    """How batch normalisation is scored, and in which precision."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS evaluations (
    weights TEXT NOT NULL, images TEXT NOT NULL, mode TEXT NOT NULL, arch TEXT NOT NULL,
    seen INTEGER NOT NULL, correct1 INTEGER NOT NULL, correct5 INTEGER NOT NULL, loss_sum REAL,
    PRIMARY KEY (weights, images, mode, arch)
) WITHOUT ROWID
"""


class EvaluationStore:
    """The evaluations of one file, or of this process alone when there is no file.

    Raises `UserError` when the file is not such a store.
    """

    def __init__(self, path: str | Path | None) -> None:
        try:
            self._database = sqlite3.connect(":memory:" if path is None else path, timeout=60)
            with self._database:
                self._database.execute(_SCHEMA)
        except sqlite3.Error as error:
            raise UserError(
                f"cannot use {path} as the file of evaluations: {error}; "
                "give a file that this program wrote, or a new name"
            ) from None

    def load(self, key: StoreKey) -> dict[str, Tally]:
        """All tallies under a key, by architecture."""
        rows = self._database.execute(
            "SELECT arch, seen, correct1, correct5, loss_sum FROM evaluations "
            "WHERE weights = ? AND images = ? AND mode = ?",
            key,
        )
        return {
            arch: Tally(seen, correct1, correct5, float("nan") if loss_sum is None else loss_sum)
            for arch, seen, correct1, correct5, loss_sum in rows
        }

    def save(self, key: StoreKey, tallies: Mapping[str, Tally]) -> None:
        """Write or replace the tallies of some architectures, all or none of them."""
        rows = [(*key, arch, *tally) for arch, tally in tallies.items()]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()
