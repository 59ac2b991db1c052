"""How well do two lists of accuracies rank the same networks? With intervals from resampling the networks."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, pearsonr, spearmanr

Values = NDArray[np.float64]
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
    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    result: dict[str, Any] = {}
    for name, statistic in STATISTICS.items():
        result[name] = _or_none(statistic, a, b)
        sampled = [value for rows in draws if (value := _or_none(statistic, a[rows], b[rows])) is not None]
        interval = [float(bound) for bound in np.percentile(sampled, (2.5, 97.5))] if sampled else None
        result[f"{name}_interval"] = interval
    return result


def _or_none(statistic: Callable[[Values, Values], float], a: Values, b: Values) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return statistic(a, b) if statistic is STATISTICS["gap"] and len(a) else None
    return statistic(a, b)
