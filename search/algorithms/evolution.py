"""Evolutionary search over one-shot accuracy (paper, section 3.3).

A generation is evaluated in one batch, so that subnets with common beginnings share their computation. Limits are
checked before evaluation, nothing is evaluated twice, and the last generation is ranked like every other. A generation
depends only on the settings and the generations before it: a search that continues from stored generations ends
exactly like one that was never interrupted.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Arch, Space
from bsnas.search.algorithms.sampler import Sampler
from bsnas.search.algorithms.variation import crossover, mutate
from bsnas.search.costs.constraints import Constraints

PATIENCE = 300
"""Proposals in a row that bring nothing new before a part of a generation is left short."""


class Score(Protocol):
    """What an evaluation must tell; the evaluator's scores do."""

    @property
    def top1(self) -> float: ...
    @property
    def top5(self) -> float: ...
    @property
    def loss(self) -> float: ...
    @property
    def complete(self) -> bool:
        """Whether it is of all images, not only of as many as showed that others are better."""
        ...


Evaluate = Callable[[list[Arch]], Sequence[Score]]
"""Scores of architectures, in order."""


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Settings of the evolution; the defaults are the paper's."""

    population: int = 75
    """Architectures in a generation."""
    iterations: int = 20
    """Generations bred after the first, random one."""
    parents: int = 10
    """The best architectures so far that children come from."""
    crossover: int = 25
    """Children by crossover in every generation."""
    mutation: int = 25
    """Children by mutation in every generation; the rest of the population is drawn at random."""
    mutation_probability: float = 0.1
    """Probability of every gene to be drawn anew."""
    seed: int = 0
    """Seed of everything random in the search."""

    def __post_init__(self) -> None:
        if self.population < 1 or self.iterations < 0 or self.parents < 1:
            raise UserError(
                f"population {self.population}, iterations {self.iterations}, parents {self.parents}; "
                "population and parents must be at least 1 and iterations at least 0"
            )
        if min(self.crossover, self.mutation) < 0 or self.crossover + self.mutation > self.population:
            raise UserError(
                f"{self.crossover} children by crossover and {self.mutation} by mutation do not fit into a population "
                f"of {self.population}; give numbers that sum to at most the population"
            )
        if not 0 <= self.mutation_probability <= 1:
            raise UserError(f"mutation probability {self.mutation_probability}; it must lie between 0 and 1")

    @classmethod
    def scaled(cls, *, population: int, iterations: int, seed: int) -> "EvolutionConfig":
        """The paper's proportions (a third by crossover, a third by mutation) at another population size."""
        share = population // 3
        return cls(population=population, iterations=iterations, crossover=share, mutation=share, seed=seed)


@dataclass(frozen=True)
class Candidate:
    """An evaluated architecture."""

    arch: Arch
    costs: dict[str, float]
    """Costs of the released network by name, as `macs`."""
    top1: float
    """One-shot accuracy on the search-validation images, 0 to 1."""
    top5: float
    loss: float
    complete: bool = True
    """Whether the accuracy is of all images; if not, others are certainly better (search/algorithms/race.py)."""

    def rank_key(self) -> tuple[bool, float, float, float]:
        """Sorts the best first: complete scores, then accuracy, then loss, then MACs."""
        return (not self.complete, -self.top1, self.loss, self.costs.get("macs", 0))


Generation = list[Candidate]


def evolve(
    space: Space,
    constraints: Constraints,
    evaluate: Evaluate,
    config: EvolutionConfig,
    done: Sequence[Generation] = (),
) -> Iterator[Generation]:
    """Yield every generation after its evaluation, from the first that `done` does not hold.

    Args:
        space: what to search; only live operations are used.
        constraints: limits on the released network; every cost in it is recorded with the candidates.
        evaluate: called once per generation with architectures never evaluated before.
        config: sizes, probabilities and seed.
        done: generations of an interrupted search with the same arguments.

    Ends early when the limits leave nothing new to evaluate. Raises `UserError` when no architecture keeps the limits.
    """
    sampler = Sampler(space, constraints)
    generations = list(done)
    while len(generations) <= config.iterations:
        rng = random.Random(f"{config.seed}/generation/{len(generations)}")
        known = [candidate for generation in generations for candidate in generation]
        archs = breed(sampler, known, config, rng)
        if not archs:
            if not known:
                raise sampler.nothing_found()
            return
        generation = score(archs, evaluate, constraints)
        generations.append(generation)
        yield generation


def score(archs: list[Arch], evaluate: Evaluate, constraints: Constraints) -> Generation:
    """Evaluate architectures; every cost of the constraints is recorded with them."""
    return [
        Candidate(
            arch,
            {name: cost(arch) for name, cost in constraints.costs.items()},
            score.top1,
            score.top5,
            score.loss,
            score.complete,
        )
        for arch, score in zip(archs, evaluate(archs), strict=True)
    ]


def first_generation(sampler: Sampler, count: int, rng: random.Random, given: Sequence[Arch]) -> list[Arch]:
    """Different architectures inside the limits, `given` ones first, then random; fewer where no more are found."""
    found = dict.fromkeys(arch for arch in given[:count] if sampler.constraints.allow(arch))
    misses = 0
    while len(found) < count and misses < PATIENCE:
        arch = sampler.draw(rng)
        if arch in found or not sampler.constraints.allow(arch):
            misses += 1
            continue
        found[arch] = None
        misses = 0
    return list(found)


def ranked(generations: Sequence[Generation]) -> list[Candidate]:
    """All candidates, the best first."""
    return sorted((c for generation in generations for c in generation), key=Candidate.rank_key)


def breed(sampler: Sampler, known: Sequence[Candidate], config: EvolutionConfig, rng: random.Random) -> list[Arch]:
    """The next generation: new architectures inside the limits, by crossover, mutation and random draws.

    It is all random when nothing is known yet. Where crossover or mutation run out of new children, random draws take
    their place; where those run out too, the generation is smaller than the population.
    """
    space = sampler.space
    seen = {candidate.arch for candidate in known}
    parents = [candidate.arch for candidate in sorted(known, key=Candidate.rank_key)[: config.parents]]
    children: list[Arch] = []

    def add(count: int, propose: Callable[[], Arch]) -> None:
        misses = 0
        while count > 0 and misses < PATIENCE:
            arch = propose()
            if arch in seen or not sampler.constraints.allow(arch):
                misses += 1
                continue
            seen.add(arch)
            children.append(arch)
            count, misses = count - 1, 0

    if len(parents) > 1:
        add(config.crossover, lambda: crossover(space, rng.sample(parents, 2), rng))
    if parents:
        add(config.mutation, lambda: mutate(space, rng.choice(parents), rng, config.mutation_probability))
    add(config.population - len(children), lambda: sampler.draw(rng))
    return children
