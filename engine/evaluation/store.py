"""Every subnet evaluation, in one SQLite file: nothing is evaluated twice, and a killed evaluation goes on.

A row holds the answers of one architecture to the first `seen` images of an evaluation set. Rows are written in one
transaction per batch of work, so a process killed at any moment loses at most the batch that was running.
"""

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsnas.engine.host.errors import UserError


@dataclass(frozen=True)
class Tally:
    """What an architecture answered to the first `seen` images of an evaluation set, in visiting order."""

    seen: int = 0
    correct5: int = 0
    loss_sum: float = 0.0
    bits: bytes = b""
    """Which first answers are right, a bit per image (numpy.packbits)."""

    @classmethod
    def of(cls, answers: np.ndarray, correct5: int, loss_sum: float) -> "Tally":
        """From right or wrong first answers, bool [seen]."""
        return cls(len(answers), correct5, loss_sum, np.packbits(answers).tobytes())

    @property
    def answers(self) -> np.ndarray:
        """Right or wrong first answers, bool [seen]."""
        return np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.seen).astype(bool)

    @property
    def correct1(self) -> int:
        return int(self.answers.sum())

    def plus(self, other: "Tally") -> "Tally":
        """This on the images before, `other` on those that follow."""
        answers = np.concatenate([self.answers, other.answers])
        return Tally.of(answers, self.correct5 + other.correct5, self.loss_sum + other.loss_sum)


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
    seen INTEGER NOT NULL, correct1 INTEGER NOT NULL, correct5 INTEGER NOT NULL, loss_sum REAL, answers BLOB NOT NULL,
    PRIMARY KEY (weights, images, mode, arch)
) WITHOUT ROWID
"""


def _plain(sql: str) -> str:
    return " ".join(sql.replace("IF NOT EXISTS", "").split())


def _tally(arch: Any, seen: Any, correct1: Any, correct5: Any, loss_sum: Any, bits: Any) -> Tally:
    """A row as a tally. Raises `ValueError` when its fields do not agree."""
    types = (type(arch), type(seen), type(correct1), type(correct5), type(bits))
    if types != (str, int, int, int, bytes) or type(loss_sum) not in (float, type(None)):
        raise ValueError("a value is of another type")
    tally = Tally(seen, correct5, float("nan") if loss_sum is None else loss_sum, bits)
    if not 0 <= seen <= 8 * len(bits) < seen + 8 or not correct1 <= correct5 <= seen or tally.correct1 != correct1:
        raise ValueError(f"the answers of {arch[:80]} do not agree with their counts")
    return tally


class EvaluationStore:
    """The evaluations of one file, or of this process alone when there is no file.

    Raises `UserError` when the file is not such a store.
    """

    def __init__(self, path: str | Path | None) -> None:
        try:
            self._database = sqlite3.connect(":memory:" if path is None else path, timeout=60)
            self._database.execute("PRAGMA trusted_schema = OFF")  # nothing in the file is run
            self._database.execute("PRAGMA cell_size_check = ON")
            with self._database:
                self._database.execute(_SCHEMA)
            made = self._database.execute("SELECT type, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        except sqlite3.Error as error:
            raise UserError(
                f"cannot use {path} as the file of evaluations: {error}; "
                "give a file that this program wrote, or a new name"
            ) from None
        if [(kind, _plain(sql)) for kind, sql in made] != [("table", _plain(_SCHEMA))]:
            raise UserError(f"{path} has other tables than a file of evaluations; give one that this program wrote")
        self._path = path

    def load(self, key: StoreKey) -> dict[str, Tally]:
        """All tallies under a key, by architecture. Raises `UserError` for a damaged file."""
        try:
            rows = self._database.execute(
                "SELECT arch, seen, correct1, correct5, loss_sum, answers FROM evaluations "
                "WHERE weights = ? AND images = ? AND mode = ?",
                key,
            ).fetchall()
            return {row[0]: _tally(*row) for row in rows}
        except (sqlite3.DatabaseError, ValueError) as error:
            raise UserError(
                f"the evaluations in {self._path} are damaged: {error}; restore the file, or remove it to score anew"
            ) from None

    def save(self, key: StoreKey, tallies: Mapping[str, Tally]) -> None:
        """Write or replace the tallies of some architectures, all or none of them."""
        rows = [
            (*key, arch, tally.seen, tally.correct1, tally.correct5, tally.loss_sum, tally.bits)
            for arch, tally in tallies.items()
        ]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()
