import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limited_sampling import Sampler, check_limits, counted_from_reference
from bsnas.engine.space.limits import Limit, parse_count
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from tests.search.spaces import all_archs, random_space


def costs_of(space):
    model = CostModel(space)
    return {"macs": model.macs, "params": model.params}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_terms_sum_to_the_cost_and_it_has_these_extremes(rng):
    space = random_space(rng)
    archs = all_archs(space)
    for cost in costs_of(space).values():
        assert cost.range() == (min(map(cost, archs)), max(map(cost, archs)))
        arch = rng.choice(archs)
        total, terms = counted_from_reference(cost)
        before = space.entry_channels
        for i, op in enumerate(arch.operations):
            total += terms[i][before, op.channels][op.block_op]
            before = op.channels
        assert total == cost(arch)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_draws_are_live_and_reach_whatever_keeps_the_limits(rng):
    space = random_space(rng, max_architectures=300)
    costs = costs_of(space)
    archs = all_archs(space)
    middle = rng.choice(archs)
    limits = (Limit("macs", high=costs["macs"](middle)), Limit("params", high=costs["params"](middle)))
    problem = Problem(space, limits[: rng.randint(1, 2)], costs)
    sampler = Sampler(problem)
    drawn = [sampler.draw(rng) for _ in range(300)]
    for arch in drawn:
        space.check(arch)
    assert any(problem.allows(arch) for arch in drawn)


def test_the_sampler_draws_close_to_every_limit_of_table_1():
    space = space_named("imagenet")
    rng = random.Random(0)
    costs = costs_of(space)
    for limit in (Limit("macs", high=205e6), Limit("macs", low=765e6), Limit("macs", 300e6, 301e6)):
        problem = Problem(space, (limit,), costs)
        sampler = Sampler(problem)
        kept = sum(problem.allows(sampler.draw(rng)) for _ in range(200))
        assert kept > 40, f"{limit}: only {kept} of 200 draws"
        assert not any(problem.allows(uniform_arch(space, rng)) for _ in range(200)), "rejection would do here"


def test_draws_spread_over_the_feasible_range():
    space = space_named("imagenet")
    rng = random.Random(0)
    sampler = Sampler(Problem(space, (Limit("macs", high=600e6),), costs_of(space)))
    macs = CostModel(space).macs
    tenths = Counter(int((macs(sampler.draw(rng)) - 200e6) / 40e6) for _ in range(2000))
    assert all(140 <= tenths[tenth] <= 260 for tenth in range(10)), tenths


def test_without_limits_the_sampler_is_the_uniform_one():
    space = space_named("imagenet")
    sampler = Sampler(Problem(space, (), costs_of(space)))
    assert sampler.draw(random.Random(5)) == uniform_arch(space, random.Random(5))


def test_an_unreachable_limit_names_the_reachable_range_at_once():
    space = space_named("imagenet")
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        check_limits(Problem(space, (Limit("macs", high=100e6),), costs_of(space)))
    assert time.perf_counter() - start < 1
    assert str(caught.value) == (
        "no architecture has macs <= 100M; reachable in this space: macs 199.97M to 773.4M; "
        "set the limits inside what is reachable"
    )
    low = parse_count("199.97M")
    assert Sampler(Problem(space, (Limit("macs", high=low),), costs_of(space))).draw(random.Random(0))


def test_limits_that_exclude_each_other_name_what_the_others_leave():
    space = space_named("imagenet")
    start = time.perf_counter()
    limits = (Limit("macs", low=750e6), Limit("params", high=3e6))
    with pytest.raises(
        UserError, match="macs >= 750M and params <= 3M; reachable while the other limits are kept: macs"
    ):
        check_limits(Problem(space, limits, costs_of(space)))
    assert time.perf_counter() - start < 5
