"""What a correction is worth that learns from some of a table's trainings: how it ranks all other networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsnas.benchmarks.parts.tabular.public_table import Row
from bsnas.benchmarks.parts.tabular.ranking import BUDGETS, tau, tau_in_bands
from bsnas.benchmarks.parts.tabular.scored_run import candidates_of
from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.correction import Correction, TrainedNetwork

DRAWS = 10
"""Sets of trained networks that are drawn."""


def corrected(space: Space, networks: Mapping[Arch, Row], scores: Sequence[Score], trained: int) -> dict[str, Any]:
    """`tau`, `tau_bands` and `regret` by budget of predictions learned from one training each of `trained` networks.

    Means over draws of these, each with the range of the draws; the networks that were drawn are left out of tau, and
    take part in regret with that training, as finals would know them.
    """
    rng = np.random.default_rng(0)
    rows, archs = list(networks.values()), list(networks)
    candidates = candidates_of(archs, scores)
    accuracies, macs = np.array([row.accuracy for row in rows]), np.array([row.macs for row in rows], np.float64)
    found: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        drawn = rng.choice(len(rows), trained, replace=False)
        known = {int(n): float(rng.choice(rows[n].accuracies)) / 100 for n in drawn}
        learned = [TrainedNetwork(archs[n], candidates[n].loss, top1) for n, top1 in known.items()]
        predicted, _ = Correction(space, learned).predict(candidates)
        others = np.setdiff1d(np.arange(len(rows)), drawn)
        found.setdefault("tau", []).append(tau(predicted[others], accuracies[others]))
        found.setdefault("tau_bands", []).append(tau_in_bands(predicted[others], accuracies[others], macs[others]))
        predicted[list(known)] = list(known.values())
        for budget in BUDGETS:
            inside = np.flatnonzero(macs <= budget * 1e6)
            if len(inside):
                first = inside[predicted[inside].argmax()]
                regret = float(accuracies[inside].max() - accuracies[first])
                found.setdefault(f"regret_{budget}", []).append(regret)
    return {
        "trained": trained,
        **{key: float(np.mean(values)) for key, values in found.items()},
        **{f"{key}_range": [min(values), max(values)] for key, values in found.items()},
    }
