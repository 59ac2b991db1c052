"""NSGA-II (Deb et al., 2002) over one-shot accuracy and costs: the whole Pareto set from one search.

Sorting, crowding and hypervolume are pymoo's; variation is that of the single-objective search, since which genes are
live depends on others.
"""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limited_sampling import Sampler
from bsnas.engine.space.limits import Ranges
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig, new_ones
from bsnas.search.algorithms.variation import crossover, mutate


def breed_front(
    sampler: Sampler, known: Sequence[Candidate], config: EvolutionConfig, rng: random.Random
) -> list[Arch]:
    """The next generation: new architectures inside the limits, by crossover and mutation of parents that win
    tournaments of two.

    `population` survivors of everything known are the parents of as many children. Where these bring nothing new,
    random draws take their place. The first generation is the network of the smallest cost, for each cost that is a
    sum, and random draws.
    """
    problem, space = sampler.problem, sampler.problem.space
    taken = {candidate.arch for candidate in known}
    children: list[Arch] = []
    if known:
        parents = survivors(known, problem.minimised, config.population)

        def winner() -> Arch:
            return parents[min(rng.randrange(len(parents)) for _ in range(2))].arch

        def bred() -> Arch:
            return mutate(space, crossover(space, (winner(), winner()), rng), rng, config.mutation_probability)

        children = new_ones(bred, config.population, problem, taken)
    else:
        smallest = [cost.best(min)[1] for name in problem.minimised if (cost := problem.costs[name]).adds]
        children = [arch for arch in dict.fromkeys(smallest[: config.population]) if problem.allows(arch)]
        taken.update(children)
    return children + new_ones(lambda: sampler.draw(rng), config.population - len(children), problem, taken)


def survivors(candidates: Sequence[Candidate], costs: Sequence[str], count: int) -> list[Candidate]:
    """The best `count`, best first: by front, and inside a front by how far the neighbours are."""
    points = objectives(candidates, costs)
    ordered: list[Candidate] = []
    for front in NonDominatedSorting().do(points, n_stop_if_ranked=count):
        crowding = calc_crowding_distance(points[front])
        ordered += [candidates[front[k]] for k in np.argsort(-crowding, kind="stable")]
    return ordered[:count]


def pareto_front(candidates: Sequence[Candidate], costs: Sequence[str]) -> list[Candidate]:
    """The candidates that no other dominates, by ascending first cost; of equals in every objective the first."""
    if not candidates:
        return []
    points = objectives(candidates, costs)
    first = np.unique(points, axis=0, return_index=True)[1]
    best = first[NonDominatedSorting().do(points[first], only_non_dominated_front=True)]
    return sorted((candidates[k] for k in sorted(best)), key=lambda c: (c.costs[costs[0]], -c.top1))


def hypervolume(candidates: Sequence[Candidate], costs: Sequence[str], ranges: Ranges) -> float:
    """Share of the box from (top-1 0, largest costs) to (top-1 1, smallest costs) that the candidates dominate."""
    if not candidates:
        return 0.0
    low, high = (np.array([top1, *(ranges[cost][end] for cost in costs)]) for end, top1 in ((0, -1.0), (1, 0.0)))
    scaled = (objectives(candidates, costs) - low) / np.where(high > low, high - low, 1)
    return float(HV(ref_point=np.ones(len(low)))(scaled))


def objectives(candidates: Sequence[Candidate], costs: Sequence[str]) -> NDArray[np.float64]:
    """What is minimised, [candidates, 1 + costs]: negated top-1, then the costs."""
    return np.array([[-c.top1, *(c.costs[cost] for cost in costs)] for c in candidates])
