"""One search: how its generations are made, scored, stored and ranked.

A generation is evaluated in one batch, so that subnets with common beginnings share their computation. Limits are
checked before evaluation, nothing is evaluated twice, and the last generation is ranked like every other. A generation
depends only on the settings and the generations before it: a search that continues from stored generations ends
exactly like one that was never interrupted.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limited_sampling import Sampler
from bsnas.engine.space.problem import Problem
from bsnas.search.algorithms.correction import Correction
from bsnas.search.algorithms.evolution import (
    Candidate,
    EvolutionConfig,
    Generation,
    Valued,
    accuracy_front,
    breed,
    by_top1,
    ranked,
)
from bsnas.search.algorithms.nsga2 import breed_front, pareto_front
from bsnas.search.runs.history import History
from bsnas.search.runs.printing import print_generation

Evaluate = Callable[[list[Arch]], Sequence[Score]]
"""Scores of architectures, in order."""


@dataclass(frozen=True)
class Result:
    """What a search found."""

    found: list[Candidate]
    """Its own candidates, in order."""
    reused: int
    """How many of them were known before."""
    inside: list[Candidate]
    """All candidates inside the limits, those of comparable searches among them, the best first."""
    front: list[Candidate]
    """Those that no other beats in accuracy and MACs, or in the objectives where several were asked for."""


def search(
    problem: Problem,
    config: EvolutionConfig,
    evaluate: Evaluate,
    history: History,
    valued: Valued = by_top1,
    correction: Correction | None = None,
) -> Result:
    """Run or continue one search. Every generation is stored before the next one begins.

    What it found is ranked by what the correction expects, if one is given.
    """
    done = [[valued(candidate) for candidate in generation] for generation in history.load()]
    others = [valued(replace(other, costs=problem.costs_of(other.arch))) for other in history.comparable()]
    known = {candidate.arch for rows in (*done, others) for candidate in rows}
    front_of = partial(pareto_front, costs=problem.minimised) if problem.minimised else accuracy_front
    loaded, started = len(done), time.perf_counter()
    for generation in generations(problem, config, evaluate, done, valued, correction):
        done.append(generation)
        history.save(done)
        if history.process.is_main:
            so_far = ranked(_all(done))
            seconds = time.perf_counter() - started
            print_generation(so_far[0], len(front_of(so_far)), done, config.iterations, loaded, seconds)
    found = _all(done)
    if correction is not None:
        found, others = correction.expected(found), correction.expected(others)
    inside = ranked([*found, *(other for other in others if problem.allows(other.arch))])
    front = front_of(inside if problem.minimised else [*found, *others])
    return Result(found, sum(candidate.arch in known for candidate in found), inside, front)


def generations(
    problem: Problem,
    config: EvolutionConfig,
    evaluate: Evaluate,
    done: Sequence[Generation] = (),
    valued: Valued = by_top1,
    correction: Correction | None = None,
) -> Iterator[Generation]:
    """Yield every generation after its evaluation, from the first that `done` does not hold.

    Args:
        problem: with costs to minimise, NSGA-II breeds the generations; else the paper's evolution.
        config: sizes, probabilities and seed.
        evaluate: called once per generation with architectures never evaluated before.
        done: generations of an interrupted search with the same arguments.
        valued: what candidates are ranked by.
        correction: what they are ranked by in the last third of the generations instead, with hope.

    Ends early when the limits leave nothing new to evaluate. Raises `UserError` when no architecture keeps the limits.
    """
    next_generation, seed = (breed_front, "front") if problem.minimised else (breed, "generation")
    sampler = Sampler(problem)
    found = list(done)
    while len(found) <= config.iterations:
        rng = random.Random(f"{config.seed}/{seed}/{len(found)}")
        known = _all(found)
        if correction is not None and 3 * len(found) > 2 * config.iterations:
            known = correction.hopeful(known)
        archs = next_generation(sampler, known, config, rng)
        if not archs:
            if not any(found):
                raise sampler.nothing_found()
            return
        scores = zip(archs, evaluate(archs), strict=True)
        found.append([valued(Candidate(a, problem.costs_of(a), s.top1, s.top5, s.loss, s.complete)) for a, s in scores])
        yield found[-1]


def _all(generations: Sequence[Generation]) -> list[Candidate]:
    return [candidate for generation in generations for candidate in generation]
