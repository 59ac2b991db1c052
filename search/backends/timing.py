"""Timing a session: warmed-up repeats and their percentiles."""

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bsnas.search.backends.base import Session

_FEWEST = 3
"""Timed runs of a visit that are made however long they take."""


class Latency(NamedTuple):
    """Wall-clock time of one batch, input already on the device, from the call until the logits are there."""

    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    """At the median."""
    repeats: int

    @classmethod
    def of(cls, times_ms: Sequence[float], batch: int) -> "Latency":
        low, p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (0, 50, 90, 99)))
        return cls(low, p50, p90, p99, batch / p50 * 1e3, len(times_ms))


class Timed(NamedTuple):
    """What `measure_in_turn` found of one session."""

    latency: Latency
    slowdown: float
    """Median over the fastest pass's median: near 1 on a quiet machine."""


def measure_in_turn(
    sessions: Sequence[Session],
    batch: int,
    *,
    repeats: int,
    passes: int,
    max_seconds: float,
    warmup_seconds: float,
    rng: random.Random,
) -> list[Timed]:
    """Time sessions whose batches are loaded, in passes over all of them, so that a slow spell meets each alike.

    Args:
        sessions: what to time.
        batch: images in a batch.
        repeats: timed runs of each session in all.
        passes: over all sessions, each in another random order; a session's runs are spread over them.
        max_seconds: a session's timed runs of a pass end after its share of this, with at least `_FEWEST`.
        warmup_seconds: of uncounted runs of each session before its first timed one, in which a GPU or a CPU leaves
            its power-saving state; later passes have a single uncounted run, which brings the caches back.
    """
    medians: list[list[float]] = [[] for _ in sessions]
    times_ms: list[list[float]] = [[] for _ in sessions]
    for turn in range(passes):
        for index in rng.sample(range(len(sessions)), len(sessions)):
            started = time.perf_counter()
            sessions[index].run()
            while not turn and time.perf_counter() - started < warmup_seconds:
                sessions[index].run()
            found = _times_ms(sessions[index], -(-repeats // passes), max_seconds / passes)
            times_ms[index] += found
            medians[index].append(float(np.median(found)))
    return [
        Timed(Latency.of(found, batch), float(np.median(found)) / min(low))
        for found, low in zip(times_ms, medians, strict=True)
    ]


def _times_ms(session: Session, repeats: int, max_seconds: float) -> list[float]:
    """Milliseconds of runs one after another; at least `_FEWEST` of them where `max_seconds` ends it early."""
    times_ms: list[float] = []
    started = time.perf_counter()
    while len(times_ms) < repeats:
        before = time.perf_counter()
        session.run()
        now = time.perf_counter()
        times_ms.append((now - before) * 1e3)
        if now - started > max_seconds and len(times_ms) >= _FEWEST:
            break
    return times_ms


def interleaved_ms(
    sessions: Sequence[Session], *, visits: int, calls: int, max_seconds: float, rng: random.Random
) -> NDArray[np.float64]:
    """Times of sessions with loaded batches, taken in turn so that a slow spell of the machine meets all of them.

    Args:
        sessions: what to time.
        visits: rounds; in each, every session is visited once, in random order.
        calls: timed calls of a visit after one that warms the caches; the visit's time is their median.
        max_seconds: no round starts after this time once five are done.

    Returns milliseconds [visits done, sessions].
    """
    started = time.perf_counter()
    rows: list[list[float]] = []
    while len(rows) < visits and (len(rows) < 5 or time.perf_counter() - started < max_seconds):
        row = [0.0] * len(sessions)
        for index in rng.sample(range(len(sessions)), len(sessions)):
            sessions[index].run()
            row[index] = float(np.median(_times_ms(sessions[index], calls, float("inf"))))
        rows.append(row)
    return np.array(rows)
