"""What finals and a correction find inside a budget, with the trainings of a table in the place of their own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bsnas.benchmarks.parts.tabular.public_table import Row
from bsnas.benchmarks.parts.tabular.ranking import BUDGETS
from bsnas.benchmarks.parts.tabular.scored_run import candidates_of
from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.correction import Correction, TrainedNetwork
from bsnas.search.algorithms.evolution import Candidate

ENTRANTS, OTHERS = 8, 6
"""The best by score that are trained, and random ones beside them for the correction."""
STEPS = (ENTRANTS, 2 * ENTRANTS + OTHERS, 3 * ENTRANTS + OTHERS)
"""Trainings: of finals by score, and of two further ones, each of the best by mean and deviation of the correction."""
DRAWS = 20
"""Of the random networks, and of one of the trainings of each network."""


class _Draw:
    """Networks inside a budget, of which a draw knows one training each of those that it trains."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        self.rows, self.rng = rows, np.random.default_rng(seed)
        self.known: dict[int, float] = {}

    def train(self, chosen: Iterable[int]) -> None:
        self.known |= {int(n): float(self.rng.choice(self.rows[n].accuracies)) / 100 for n in chosen}

    def regret(self) -> float:
        """Points between the best network and the one with the best known training, by their means."""
        found = max(self.known.items(), key=lambda pair: pair[1])[0]
        return max(row.accuracy for row in self.rows) - self.rows[found].accuracy

    def others(self) -> NDArray[np.int64]:
        return np.setdiff1d(np.arange(len(self.rows)), list(self.known))


def finals(
    space: Space, networks: Mapping[Arch, Row], scores: Sequence[Score], values: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each of `STEPS`: `trained`, and by budget `regret` of what was found by so many trainings and `random`,
    that of as many random networks: points of top-1, means over draws with 95 % intervals.

    `values` rank the networks for the first finals, the larger the better. Budgets with too few networks are left out.
    """
    found: list[dict[str, Any]] = [{"trained": trained} for trained in STEPS]
    triples = list(zip(networks.items(), scores, values, strict=True))
    for budget in BUDGETS:
        inside = [(arch, row, score, value) for (arch, row), score, value in triples if row.macs <= budget * 1e6]
        if len(inside) < STEPS[-1]:
            continue
        candidates = candidates_of([arch for arch, *_ in inside], [score for _, _, score, _ in inside])
        best_first = np.argsort([-value for *_, value in inside], kind="stable")
        regrets = np.array([_regrets(space, [row for _, row, _, _ in inside], candidates, best_first, seed)
                            for seed in range(DRAWS)])  # fmt: skip
        for row, both in zip(found, regrets.transpose(1, 2, 0), strict=True):
            for name, values_of in zip(("regret", "random"), both, strict=True):
                mean, half = float(values_of.mean()), 1.96 * float(values_of.std(ddof=1)) / DRAWS**0.5
                row |= {f"{name}_{budget}": mean, f"{name}_{budget}_interval": [mean - half, mean + half]}
    return found


def _regrets(
    space: Space, rows: Sequence[Row], candidates: Sequence[Candidate], best_first: NDArray[np.int64], seed: int
) -> list[tuple[float, float]]:
    """For each of `STEPS` the regrets of finals and of random networks."""
    draw, found = _Draw(rows, seed), []
    for step, trained in enumerate(STEPS):
        if step == 0:
            draw.train(best_first[:ENTRANTS])
        else:
            if step == 1:
                draw.train(draw.rng.choice(draw.others(), OTHERS, replace=False))
            learned = [TrainedNetwork(candidates[n].arch, candidates[n].loss, top1) for n, top1 in draw.known.items()]
            rest = draw.others()
            mean, deviation = Correction(space, learned).predict([candidates[n] for n in rest])
            draw.train(rest[np.argsort(-(mean + deviation))][:ENTRANTS])
        random = _Draw(rows, seed)
        random.train(random.rng.choice(len(rows), trained, replace=False))
        found.append((draw.regret(), random.regret()))
    return found


def print_finals(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each number of trainings."""
    budgets = [budget for budget in BUDGETS if f"regret_{budget}" in rows[0]]
    print(f"\nfinals by the table's trainings: regret at {', '.join(map(str, budgets))} M; of as many random networks")
    for row in rows:
        print(f"{row['trained']:3} trained  {_shown(row, 'regret', budgets)};  random {_shown(row, 'random', budgets)}")


def _shown(row: Mapping[str, Any], name: str, budgets: Sequence[int]) -> str:
    cells = ((row[f"{name}_{budget}"], *row[f"{name}_{budget}_interval"]) for budget in budgets)
    return ", ".join(f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in cells)
