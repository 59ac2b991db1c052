"""Finals with trainings of their own, and what a correction learns from them, judged by the table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsnas.benchmarks.parts.tabular.public_table import Row
from bsnas.benchmarks.parts.tabular.ranking import against_the_best, tau, tau_in_bands
from bsnas.benchmarks.parts.tabular.scored_run import candidates_of
from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.correction import LEAST, Correction, TrainedNetwork
from bsnas.search.runs.finals import Finals, FinalsConfig
from bsnas.search.runs.history import LatestSearch

RANDOM = 6
"""Networks of the search's first generation that are trained as well, for the correction."""


def hold_finals(trained: TrainedRun, search: LatestSearch) -> dict[str, Any]:
    """search/finals.py's finals of a search with its defaults, on all ranks. Returns what `Finals.hold` does."""
    return Finals(trained, FinalsConfig(random=RANDOM), {}, search=search).hold()


def judged(
    space: Space, held: Mapping[str, Any], networks: Mapping[Arch, Row], scores: Sequence[Score], budget: int
) -> dict[str, Any]:
    """Finals that were held among `networks` at a budget, by the table.

    Returns:
        `against_the_best` of the winner, its regret also as `regret_BUDGET`; `trained`, how many networks; `epochs`, in
        all; `tau` and `tau_bands` of what a correction expects of all networks that were not trained, where it has
        enough of them to learn from.
    """
    by_name = {str(arch): (arch, row) for arch, row in networks.items()}
    first = [*held["rungs"][0]["networks"], *held["others"]]
    known = [TrainedNetwork(by_name[row["arch"]][0], row["one_shot_loss"], row["top1"]) for row in first]
    decay, before, epochs = held["request"]["decay_epochs"], 0, 0
    for number, rung in enumerate(held["rungs"]):
        count = len(first) if number == 0 else len(rung["networks"])
        epochs += count * (rung["epochs"] - before + decay)
        before = rung["epochs"]
    winner = against_the_best(list(networks.values()), by_name[held["winner"]["arch"]][1], budget)
    found = {**winner, f"regret_{budget}": winner["regret"], "budget": budget, "trained": len(known), "epochs": epochs}
    if len(known) >= LEAST:
        trained = {network.arch for network in known}
        others = [
            (candidate, row)
            for candidate, (arch, row) in zip(candidates_of(networks, scores), networks.items(), strict=True)
            if arch not in trained
        ]
        predicted, _ = Correction(space, known).predict([candidate for candidate, _ in others])
        accuracies = np.array([row.accuracy for _, row in others])
        macs = np.array([row.macs for _, row in others], np.float64)
        found |= {"tau": tau(predicted, accuracies), "tau_bands": tau_in_bands(predicted, accuracies, macs)}
    return found
