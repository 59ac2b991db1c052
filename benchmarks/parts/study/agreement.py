"""How well do two lists of accuracies rank the same networks? With intervals from resampling the networks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, pearsonr, spearmanr

Values = NDArray[np.float64]
Indices = NDArray[np.int64]
STATISTICS: dict[str, Callable[[Values, Values], float]] = {
    "kendall_tau": lambda a, b: float(kendalltau(a, b).statistic),
    "spearman": lambda a, b: float(spearmanr(a, b).statistic),
    "pearson": lambda a, b: float(pearsonr(a, b).statistic),
    "gap": lambda a, b: float(np.mean(b - a)),
}
"""Rank and linear correlations, and how much higher the second accuracies are on average. Tau is tau-b: ties count."""


def agreement(first: Sequence[float], second: Sequence[float], *, resamples: int, seed: int = 0) -> dict[str, Any]:
    """Each of `STATISTICS`, and under NAME_interval its 95 % percentile interval over bootstrap samples of networks.

    A statistic is None where it does not exist, as a correlation with values that are all equal; samples in which it
    does not are left out. Fewer than two networks have none.
    """
    a, b = np.array(first, np.float64), np.array(second, np.float64)

    def of(name: str) -> Callable[[Indices], float | None]:
        return lambda rows: statistic_of(name, a[rows], b[rows])

    result: dict[str, Any] = {}
    for name in STATISTICS:
        result |= with_interval(name, of(name), len(a), resamples=resamples, seed=seed)
    return result


def with_interval(
    name: str, statistic: Callable[[Indices], float | None], count: int, *, resamples: int, seed: int = 0
) -> dict[str, Any]:
    """A statistic of some of `count` networks: of all of them, and under NAME_interval as `agreement` says."""
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    sampled = [value for rows in draws if (value := statistic(rows)) is not None]
    interval = [float(bound) for bound in np.percentile(sampled, (2.5, 97.5))] if sampled else None
    return {name: statistic(np.arange(count)), f"{name}_interval": interval}


def statistic_of(name: str, a: Values, b: Values) -> float | None:
    """One of `STATISTICS`; None where it does not exist."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return STATISTICS[name](a, b) if name == "gap" and len(a) else None
    return STATISTICS[name](a, b)
