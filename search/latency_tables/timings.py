"""Timings of network parts and whole networks in one SQLite file: an interrupted measurement goes on where it was.

What is stored is the ratio to a reference network timed in the same moments, so that rows from busy and quiet spells of
a machine compare; the reference's own time is stored beside it.
"""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from bsnas.engine.host.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LatencyContext:
    """What a latency belongs to; timings of different contexts are never mixed."""

    backend: str
    device: str
    """The hardware, with the number of threads on a CPU."""
    versions: str
    """Of the backend."""
    batch: int
    precision: str
    reference: str
    """The network that timings are ratios to."""


class Timing(NamedTuple):
    """What one part or network takes, as a share of what the reference took in the same moments."""

    ratio: float
    """Median over the visits."""
    spread: float
    """Interquartile range over the visits."""
    visits: int
    reference_ms: float
    """What the reference took meanwhile."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS timings (
    context TEXT NOT NULL, item TEXT NOT NULL, ratio REAL NOT NULL, spread REAL NOT NULL, visits INTEGER NOT NULL,
    reference_ms REAL NOT NULL, date TEXT NOT NULL, PRIMARY KEY (context, item)
) WITHOUT ROWID
"""


class TimingStore:
    """The timings in one file. Raises `UserError` when the file is no such store."""

    def __init__(self, file: Path) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60)
            with self._database:
                self._database.execute(_SCHEMA)
                self._database.execute("SELECT reference_ms FROM timings LIMIT 0")
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"cannot use {file} as the file of timings: {error}; remove it or give another run"
            ) from None

    def load(self, context: LatencyContext) -> dict[str, Timing]:
        """All timings of a context by the text of the part or architecture."""
        rows = self._database.execute(
            "SELECT item, ratio, spread, visits, reference_ms FROM timings WHERE context = ?", [_key(context)]
        )
        return {item: Timing(*values) for item, *values in rows}

    def save(self, context: LatencyContext, timings: Mapping[str, Timing]) -> None:
        """Write or replace timings, all or none of them."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with self._database:
            self._database.executemany(
                "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(_key(context), item, *timing, date) for item, timing in timings.items()],
            )

    def close(self) -> None:
        self._database.close()


def _key(context: LatencyContext) -> str:
    return json.dumps(asdict(context), sort_keys=True)
