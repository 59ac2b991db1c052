"""Timing a session: warmed-up repeats and their percentiles."""

import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from search.backends.base import Session


class Latency(NamedTuple):
    """Wall-clock time of one batch, input already on the device, from the call until the logits are there."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    images_per_s: float
    """At the median."""
    repeats: int


def measure(
    session: Session, batch: int, *, repeats: int, warmup: int, max_seconds: float, warmup_seconds: float = 0.0
) -> Latency:
    """Time a session whose batch is loaded.

    `warmup` runs come first, uncounted. Each of the two parts ends early once `max_seconds` have passed and it has made
    ten runs. The warmup goes on for `warmup_seconds`, in which a GPU or a CPU leaves its power-saving state.
    """
    started = time.perf_counter()
    _times_ms(session, warmup, max_seconds)
    while time.perf_counter() - started < warmup_seconds:
        session.run()
    times_ms = _times_ms(session, repeats, max_seconds)
    p50, p90, p99 = (float(value) for value in np.percentile(times_ms, (50, 90, 99)))
    return Latency(p50, p90, p99, batch / p50 * 1e3, len(times_ms))


def _times_ms(session: Session, repeats: int, max_seconds: float) -> list[float]:
    times_ms: list[float] = []
    started = time.perf_counter()
    while len(times_ms) < repeats:
        before = time.perf_counter()
        session.run()
        now = time.perf_counter()
        times_ms.append((now - before) * 1e3)
        if now - started > max_seconds and len(times_ms) >= 10:
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
