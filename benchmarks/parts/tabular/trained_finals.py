"""Finals with trainings of their own, and what a correction learns from them, judged by the table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bsnas.benchmarks.parts.tabular.public_table import Row
from bsnas.benchmarks.parts.tabular.ranking import against_the_best, tau, tau_in_bands
from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.space.arch import Arch
from bsnas.search.algorithms.correction import Correction
from bsnas.search.algorithms.evolution import Candidate
from bsnas.search.runs.finals import Finals, FinalsConfig
from bsnas.search.runs.history import LatestSearch
from bsnas.search.runs.trained_networks import trained_networks

RANDOM = 6
"""Networks of the search's first generation that are trained as well, for the correction."""


def trained_finals(
    trained: TrainedRun, search: LatestSearch, networks: Mapping[Arch, Row], scores: Sequence[Score], budget: int
) -> dict[str, Any]:
    """Hold search/finals.py's finals of a search among `networks`, on all ranks, with its defaults.

    Returns:
        `against_the_best` of the winner; `trained`, how many networks; `epochs`, in all; `tau` and `tau_bands` of what
        a correction expects of all networks that were not trained.
    """
    config = FinalsConfig(random=RANDOM)
    held = Finals(trained, config, {}, search=search).hold()
    by_name = {str(arch): row for arch, row in networks.items()}
    known = trained_networks(trained.run)
    candidates = [Candidate(a, {}, s.top1, s.top5, s.loss) for a, s in zip(networks, scores, strict=True)]
    predicted, _ = Correction(trained.config.space, known).predict(candidates)
    rows, seen = list(networks.values()), {network.arch for network in known}
    others = np.array([n for n, arch in enumerate(networks) if arch not in seen])
    accuracies, macs = np.array([row.accuracy for row in rows]), np.array([row.macs for row in rows], np.float64)
    longest = [epochs + config.decay_epochs * number for number, (_, epochs) in enumerate(config.rungs, 1)]
    finalists = [len(rung["networks"]) for rung in held["rungs"]]
    left = [*finalists[1:], 0]
    return {
        **against_the_best(rows, by_name[held["winner"]["arch"]], budget),
        "budget": budget,
        "trained": len(known),
        "epochs": sum((now - after) * epochs for now, after, epochs in zip(finalists, left, longest, strict=True))
        + len(held["others"]) * longest[0],
        "tau": tau(predicted[others], accuracies[others]),
        "tau_bands": tau_in_bands(predicted[others], accuracies[others], macs[others]),
    }
