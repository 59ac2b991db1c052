"""NSGA-II (Deb et al., 2002) over one-shot accuracy and costs: the whole Pareto set from one search.

Sorting, crowding and hypervolume are pymoo's; variation is that of the single-objective search, since which genes are
live depends on others. As there, a generation depends only on the settings and the generations before it.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pymoo.indicators.hv import HV
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

from bsnas.engine.space.space import Arch, Space
from bsnas.search.algorithms.evolution import (
    PATIENCE,
    Candidate,
    Evaluate,
    EvolutionConfig,
    Generation,
    first_generation,
    score,
)
from bsnas.search.algorithms.sampler import Sampler
from bsnas.search.algorithms.variation import crossover, mutate
from bsnas.search.costs.chain import ChainCost
from bsnas.search.costs.constraints import Constraints, Limit

Ranges = Mapping[str, tuple[float, float]]
"""Smallest and largest value of each minimised cost in the space."""


def evolve_front(
    space: Space,
    constraints: Constraints,
    evaluate: Evaluate,
    config: EvolutionConfig,
    costs: Sequence[str],
    done: Sequence[Generation] = (),
) -> Iterator[Generation]:
    """Yield every generation after its evaluation, from the first that `done` does not hold.

    As `evolution.evolve`, but top-1 is maximised and `costs` are minimised together. `population` survivors of
    everything evaluated are the parents of as many children. Random draws spread over the range of the first cost,
    and the network of the smallest cost is among the first ones.
    """
    spread = constraints.limits or tuple(Limit(cost) for cost in costs if cost not in constraints.peaks)[:1]
    sampler = Sampler(space, replace(constraints, limits=spread))
    generations = list(done)
    while len(generations) <= config.iterations:
        rng = random.Random(f"{config.seed}/front/{len(generations)}")
        known = [candidate for generation in generations for candidate in generation]
        if known:
            archs = breed_front(sampler, known, config, costs, rng)
        else:
            ends = [ChainCost(space, constraints.costs[c]).smallest(space) for c in costs if c not in constraints.peaks]
            archs = first_generation(sampler, config.population, rng, ends)
        if not archs:
            if not known:
                raise sampler.nothing_found()
            return
        generations.append(score(archs, evaluate, constraints))
        yield generations[-1]


def breed_front(
    sampler: Sampler, known: Sequence[Candidate], config: EvolutionConfig, costs: Sequence[str], rng: random.Random
) -> list[Arch]:
    """New architectures inside the limits: crossover and mutation of parents that win tournaments of two.

    Where these bring nothing new, random draws take their place.
    """
    space, seen = sampler.space, {candidate.arch for candidate in known}
    parents = survivors(known, costs, config.population)

    def winner() -> Arch:
        places = [rng.randrange(len(parents)) for _ in range(2)]
        return parents[min(places)].arch

    def bred() -> Arch:
        return mutate(space, crossover(space, (winner(), winner()), rng), rng, config.mutation_probability)

    children: list[Arch] = []
    for propose in (bred, lambda: sampler.draw(rng)):
        misses = 0
        while len(children) < config.population and misses < PATIENCE:
            arch = propose()
            if arch in seen or not sampler.constraints.allow(arch):
                misses += 1
                continue
            seen.add(arch)
            children.append(arch)
            misses = 0
    return children


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
