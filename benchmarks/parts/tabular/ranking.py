"""How well scores rank the networks of a public table, all and those of a size, and what a search finds by them.

Over all networks tau mostly measures size, which needs no training. A search compares networks of a budget: so tau
inside bands of multiply-adds, and regret, say what scores are worth.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np

from bsnas.benchmarks.parts.study.agreement import Indices, Values, statistic_of, with_interval
from bsnas.benchmarks.parts.tabular.public_table import Row

Half = Literal["choose", "report"]

BUDGETS = (40, 60, 80)
"""Millions of multiply-adds: the middles of bands, and the limits of searches."""
BAND = 0.05
"""Half the width of a band, as a share of its middle."""
RESAMPLES = 500
DRAWS = 10_000
RANDOM_SEARCHES = (1, 10, 50)
"""Trainings of the random searches beside which a search stands."""


def in_half(row: Row, half: Half | None) -> bool:
    """Settings are chosen on the half whose codes have an even CRC-32, and reported on the other."""
    return half is None or (zlib.crc32(row.code.encode()) % 2 == 0) == (half == "choose")


def tau(scores: Values, accuracies: Values) -> float:
    """Kendall's tau-b; 0 where it does not exist: such scores rank nothing."""
    return statistic_of("kendall_tau", scores, accuracies) or 0.0


def spearman(scores: Values, accuracies: Values) -> float:
    """Spearman's rank correlation; 0 where it does not exist."""
    return statistic_of("spearman", scores, accuracies) or 0.0


def tau_in_bands(scores: Values, accuracies: Values, macs: Values) -> float:
    """Tau of the pairs inside one of the bands: the mean of the bands' taus, weighted by their pairs."""
    taus, pairs = [], []
    for budget in BUDGETS:
        inside = np.abs(macs / (budget * 1e6) - 1) <= BAND
        count = int(inside.sum())
        if count > 1:
            taus.append(tau(scores[inside], accuracies[inside]))
            pairs.append(count * (count - 1) / 2)
    return float(np.average(taus, weights=pairs)) if taus else 0.0


def ranking(rows: Sequence[Row], scores: Sequence[float], *, name: str = "") -> dict[str, Any]:
    """`tau`, `spearman` and `tau_bands` of scores with the mean accuracies, and 95 % intervals over the networks.

    A name comes behind a low line: `tau_macs`, `tau_macs_bands`.
    """
    accuracies = np.array([row.accuracy for row in rows])
    macs, given = np.array([row.macs for row in rows], np.float64), np.array(scores, np.float64)
    suffix = f"_{name}" if name else ""
    statistics: dict[str, Callable[[Indices], float]] = {
        f"tau{suffix}": lambda of: tau(given[of], accuracies[of]),
        f"spearman{suffix}": lambda of: spearman(given[of], accuracies[of]),
        f"tau{suffix}_bands": lambda of: tau_in_bands(given[of], accuracies[of], macs[of]),
    }
    found: dict[str, Any] = {}
    for key, statistic in statistics.items():
        found |= with_interval(key, statistic, len(rows), resamples=RESAMPLES)
    return found


def ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """What no score can pass, over all networks and inside bands: accuracies of a table are noisy themselves.

    Two trainings of the same networks agree at a tau. Of normally distributed values tau is 2/pi asin(r); the
    reliability of a mean of n trainings follows from r by Spearman and Brown's formula, and its root is how far the
    true accuracies correlate with that mean.
    """
    trainings = np.array([row.accuracies for row in rows])
    macs, count = np.array([row.macs for row in rows], np.float64), trainings.shape[1]
    pairs = list(combinations(range(count), 2))

    def ceiling(statistic: Callable[[Values, Values], float]) -> float:
        if not pairs:
            return 1.0
        r = max(
            0.0, math.sin(math.pi / 2 * float(np.mean([statistic(trainings[:, a], trainings[:, b]) for a, b in pairs])))
        )
        return 2 / math.pi * math.asin(math.sqrt(count * r / (1 + (count - 1) * r)))

    return {"ceiling": ceiling(tau), "ceiling_bands": ceiling(lambda a, b: tau_in_bands(a, b, macs))}


def against_the_best(rows: Sequence[Row], found: Row, budget: int) -> dict[str, Any]:
    """What a search inside a budget found, beside the best of the table there and beside random searches.

    Args:
        rows: with `found` among them.
        budget: most millions of multiply-adds.

    Returns:
        `code`, `accuracy` and `macs` of the network found; `regret`, points below the best; `rank`, from 1; `networks`
        inside the budget; `random`: mean regret of the best of so many random networks.
    """
    inside = [row for row in rows if row.macs <= budget * 1e6]
    accuracies = np.array([row.accuracy for row in inside])
    best = accuracies.max()
    rng = np.random.default_rng(0)
    random = {
        n: float(best - accuracies[rng.integers(0, len(inside), (DRAWS, n))].max(1).mean()) for n in RANDOM_SEARCHES
    }
    return {
        "code": found.code, "accuracy": found.accuracy, "macs": found.macs, "regret": float(best - found.accuracy),
        "rank": int((accuracies > found.accuracy).sum()) + 1, "networks": len(inside), "random": random,
    }  # fmt: skip
