"""Evolution over one-shot accuracy (paper, section 3.3): settings, candidates, and how the next generation is bred."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.limited_sampling import Sampler
from bsnas.engine.space.problem import Problem
from bsnas.search.algorithms.variation import crossover, mutate

PATIENCE = 300
"""Proposals in a row that bring nothing new before a part of a generation is left short."""


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
    """Whether the accuracy is of all images; if not, others are certainly better (search/runs/search_run.py)."""
    value: float | None = None
    """What it is ranked by in place of top-1, the larger the better."""

    @property
    def quality(self) -> float:
        return self.top1 if self.value is None else self.value

    def rank_key(self) -> tuple[bool, float, float, float]:
        """Sorts the best first: complete scores, then what ranks them, then loss, then MACs."""
        return (not self.complete, -self.quality, self.loss, self.costs.get("macs", 0))


Generation = list[Candidate]
Valued = Callable[[Candidate], Candidate]
"""Gives a candidate the value that it is ranked by."""


def by_top1(candidate: Candidate) -> Candidate:
    return candidate if candidate.value is None else replace(candidate, value=None)


def by_loss(candidate: Candidate) -> Candidate:
    return replace(candidate, value=-candidate.loss)


def ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The best first."""
    return sorted(candidates, key=Candidate.rank_key)


def accuracy_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates with complete scores that no other beats in both quality and MACs, by ascending MACs.

    Of equals in both the first is kept, so both rise strictly along the front.
    """
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.costs["macs"], -c.quality)):
        if candidate.complete and (not front or candidate.quality > front[-1].quality):
            front.append(candidate)
    return front


def breed(sampler: Sampler, known: Sequence[Candidate], config: EvolutionConfig, rng: random.Random) -> list[Arch]:
    """The next generation: new architectures inside the limits, by crossover, mutation and random draws.

    It is all random when nothing is known yet. Where crossover or mutation run out of new children, random draws take
    their place; where those run out too, the generation is smaller than the population.
    """
    problem, space = sampler.problem, sampler.problem.space
    taken = {candidate.arch for candidate in known}
    parents = [candidate.arch for candidate in ranked(known)[: config.parents]]
    children: list[Arch] = []
    if len(parents) > 1:
        children += new_ones(lambda: crossover(space, rng.sample(parents, 2), rng), config.crossover, problem, taken)
    if parents:
        rate = config.mutation_probability
        children += new_ones(lambda: mutate(space, rng.choice(parents), rng, rate), config.mutation, problem, taken)
    return children + new_ones(lambda: sampler.draw(rng), config.population - len(children), problem, taken)


def new_ones(propose: Callable[[], Arch], count: int, problem: Problem, taken: set[Arch]) -> list[Arch]:
    """Up to `count` proposals inside the limits, each new, and taken from now on; fewer where `PATIENCE` ends."""
    found: list[Arch] = []
    misses = 0
    while len(found) < count and misses < PATIENCE:
        arch = canonical(problem.space, propose())
        if arch in taken or not problem.allows(arch):
            misses += 1
            continue
        taken.add(arch)
        found.append(arch)
        misses = 0
    return found
