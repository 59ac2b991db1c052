import random
import time
from itertools import chain
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig, accuracy_front, ranked
from bsnas.search.runs.search import generations
from tests.search.spaces import all_archs, random_space


class ToyScore(NamedTuple):
    top1: float
    top5: float = 1.0
    loss: float = 0.0
    complete: bool = True


class Toy:
    """Top-1 is the share of genes that equal those of a target; remembers every batch that it was asked for."""

    def __init__(self, target: Arch) -> None:
        self.target = target
        self.batches: list[list[Arch]] = []

    def __call__(self, archs: list[Arch]) -> list[ToyScore]:
        self.batches.append(archs)
        return [ToyScore(self.top1(arch)) for arch in archs]

    def top1(self, arch: Arch) -> float:
        genes = [a == b for a, b in zip(arch.channels, self.target.channels, strict=True)]
        genes += [a == b for a, b in zip(arch.flat_blocks, self.target.flat_blocks, strict=True)]
        return sum(genes) / len(genes)

    @property
    def asked(self) -> list[Arch]:
        return [arch for batch in self.batches for arch in batch]


def problem_of(space: Space, *limits: Limit) -> Problem:
    model = CostModel(space)
    return Problem(space, limits, {"macs": model.macs, "params": model.params})


def test_the_papers_search_finds_a_known_optimum_inside_its_budget():
    space = space_named("imagenet")
    macs = CostModel(space).macs
    target = min((uniform_arch(space, random.Random(seed)) for seed in range(200)), key=lambda a: abs(macs(a) - 460e6))
    toy = Toy(target)
    found = list(generations(problem_of(space, Limit("macs", high=465e6)), EvolutionConfig(), toy))
    assert [len(batch) for batch in toy.batches] == [75] * 21, "one batch per generation, the last one ranked too"
    assert len(set(toy.asked)) == len(toy.asked), "evaluated twice"
    assert all(macs(arch) <= 465e6 for arch in toy.asked)
    best = ranked(chain(*found))[0]
    at_random = max(toy.top1(arch) for arch in toy.batches[0])
    assert best.top1 > 0.9 > at_random + 0.2, (best.top1, at_random)
    assert best.costs == {"macs": macs(best.arch), "params": CostModel(space).params(best.arch)}


def test_a_generation_is_a_third_crossover_a_third_mutation_and_random_rest():
    space = space_named("imagenet")
    toy = Toy(uniform_arch(space, random.Random(9)))
    first, second = generations(problem_of(space), EvolutionConfig(iterations=1), toy)
    parents = [candidate.arch for candidate in ranked(first)[:10]]
    values = [[{arch.flat_blocks[i] for arch in parents}, i] for i in range(space.num_blocks)]
    crossed = [all(c.arch.flat_blocks[i] in genes for genes, i in values) for c in second]
    assert all(crossed[:25])
    distances = [
        min(sum(a != b for a, b in zip(c.arch.flat_blocks, p.flat_blocks, strict=True)) for p in parents)
        for c in second
    ]
    assert sum(distances[25:50]) / 25 < 4 < 8 < sum(distances[50:]) / 25


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_small_shrunk_spaces_are_searched_until_nothing_is_left(rng):
    space = random_space(rng, max_architectures=200)
    archs = all_archs(space)
    macs = CostModel(space).macs
    limit = Limit("macs", high=macs(rng.choice(archs)))
    feasible = {arch for arch in archs if limit.allows(macs(arch))}
    toy = Toy(rng.choice(sorted(feasible, key=str)))
    config = EvolutionConfig(population=30, iterations=15, crossover=10, mutation=10, seed=rng.randrange(9))
    found = list(generations(problem_of(space, limit), config, toy))
    assert len(set(toy.asked)) == len(toy.asked)
    assert set(toy.asked) <= feasible
    assert len(toy.asked) >= 0.9 * len(feasible)
    if len(toy.asked) == len(feasible):
        assert ranked(chain(*found))[0].top1 == 1.0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9).map(random.Random), st.integers(0, 5))
def test_a_continued_search_ends_like_an_uninterrupted_one(rng, killed_after):
    space = random_space(rng)
    problem = problem_of(space)
    toy = Toy(uniform_arch(space, rng))
    config = EvolutionConfig(population=12, iterations=5, crossover=4, mutation=4, seed=rng.randrange(9))
    whole = list(generations(problem, config, toy))
    done = whole[:killed_after]
    rest = list(generations(problem, config, toy, done))
    assert done + rest == whole


def test_seeds_decide_everything():
    space = space_named("imagenet")
    toy = Toy(uniform_arch(space, random.Random(1)))

    def run(seed):
        config = EvolutionConfig(population=9, iterations=3, crossover=3, mutation=3, seed=seed)
        return list(generations(problem_of(space, Limit("macs", high=300e6)), config, toy))

    assert run(0) == run(0) != run(1)


def test_a_space_of_one_architecture_is_evaluated_once():
    space = space_named("mobilenet-v2")
    start = time.perf_counter()
    toy = Toy(uniform_arch(space, random.Random(0)))
    (generation,) = generations(problem_of(space), EvolutionConfig(), toy)
    assert len(generation) == len(toy.asked) == 1
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "limits",
    [
        [Limit("macs", high=150e6)],
        [Limit("macs", low=800e6)],
        [Limit("macs", low=750e6), Limit("params", high=3e6)],
        [Limit("macs", low=199_964_417, high=199_964_500)],
    ],
    ids=["below", "above", "together", "gap"],
)
def test_an_infeasible_budget_ends_soon_with_the_reachable_range(limits):
    space = space_named("imagenet")
    start = time.perf_counter()
    toy = Toy(uniform_arch(space, random.Random(0)))
    with pytest.raises(
        UserError, match=r"no architecture has .*; reachable .*: macs \d.* to \d.*; set the limits inside"
    ):
        next(generations(problem_of(space, *limits), EvolutionConfig(), toy))
    assert time.perf_counter() - start < 5
    assert not toy.asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "population and parents must be at least 1"),
        ({"population": 40}, "25 children by crossover and 25 by mutation do not fit into a population of 40"),
        ({"mutation_probability": 1.5}, "mutation probability 1.5; it must lie between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        EvolutionConfig(**settings)


def test_scaled_settings_keep_the_papers_proportions():
    assert EvolutionConfig.scaled(population=75, iterations=20, seed=0) == EvolutionConfig()


ARCH = uniform_arch(space_named("mobilenet-v2"), random.Random(0))
points = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=60)


@given(points)
def test_the_front_is_the_brute_force_one(items):
    found = accuracy_front(Candidate(ARCH, {"macs": macs}, top1, 1.0, 0.0) for macs, top1 in items)
    front = [(c.costs["macs"], c.top1) for c in found]
    expected = {p for p in items if not any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in items)}
    assert set(front) == expected
    assert len(front) == len(expected), "equal points are kept once"
    assert front == sorted(front)


def test_of_equals_the_first_is_kept():
    a, b, c = (Candidate(ARCH, {"macs": macs}, 2, 1.0, loss) for macs, loss in ((1, 0.1), (1, 0.2), (2, 0.3)))
    assert accuracy_front([a, b, c]) == [a]
