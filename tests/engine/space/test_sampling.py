"""Fair and uniform sampling and the sandwich, over random spaces, full and shrunk."""

import random
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.space.arch import Operation
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import (
    fair_archs,
    fair_round,
    sandwich_ends,
    sandwich_round,
    uniform_arch,
    uniform_round,
)
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from bsnas.engine.space.table import Cluster, Row
from tests.engine.space.strategies import any_spaces, full_spaces, shrunk_at_random, shrunk_spaces

SEEDS = st.integers(0, 10**6)
ROUNDS = 7


def spread(counts: Counter, options: tuple) -> int:
    return max(counts[option] for option in options) - min(counts[option] for option in options)


def rounds_of(space: Space, seed: int, start: int = 0):
    return [fair_round(space, seed, start + r) for r in range(ROUNDS)]


@settings(max_examples=25, deadline=None)
@given(space=full_spaces(), seed=SEEDS, index=st.integers(0, 10**9))
def test_a_round_of_a_full_space_uses_every_operation_exactly_once(space, seed, index):
    paths = fair_round(space, seed, index)
    assert len(paths) == space.max_live
    for i, live in enumerate(space.live):
        counts = Counter(path.operations[i] for path in paths)
        if space.max_live % len(live) == 0:  # a cluster with fewer operations takes whole turns where it can
            assert counts == dict.fromkeys(live, space.max_live // len(live))


def test_the_papers_space_has_18_paths_a_round_and_each_operation_once():
    space = space_named("imagenet")
    for index in range(20):
        paths = fair_round(space, 3, index)
        assert len(paths) == 18
        for i, live in enumerate(space.live):
            assert sorted(path.operations[i] for path in paths) == sorted(live)
        for j in range(6):
            assert set(Counter(path.channels[j] for path in paths).values()) == {6}


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=SEEDS, start=st.integers(0, 1000))
def test_channel_options_appear_within_one_of_each_other_in_a_round(space, seed, start):
    for paths in rounds_of(space, seed, start):
        assert len(paths) == space.max_live
        for j in range(len(space.clusters)):
            assert spread(Counter(path.channels[j] for path in paths), space.live_channels(j)) <= 1


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=SEEDS, start=st.integers(0, 1000))
def test_uses_in_every_block_and_channel_stay_within_one_over_any_window_of_rounds(space, seed, start):
    rounds = rounds_of(space, seed, start)
    for first, end in combinations(range(ROUNDS + 1), 2):
        paths = [path for r in rounds[first:end] for path in r]
        for j, blocks in enumerate(space.cluster_blocks):
            for channels in space.live_channels(j):
                for i in blocks:
                    counts = Counter(path.flat_blocks[i] for path in paths if path.channels[j] == channels)
                    assert spread(counts, space.live_block_ops(i, channels)) <= 1


@settings(max_examples=10, deadline=None)
@given(space=any_spaces(), seed=SEEDS)
def test_all_paths_lie_in_the_space_and_every_live_operation_gets_its_turn(space, seed):
    # A channel number comes at least every len(options) rounds, and each of its operations once in its turn.
    turns = max(len(space.live_channels(j)) for j in range(len(space.clusters))) * space.max_live
    paths = [path for index in range(turns) for path in fair_round(space, seed, index)]
    for path in paths[: 3 * space.max_live]:
        space.check(path)
    for i, live in enumerate(space.live):
        assert {path.operations[i] for path in paths} == set(live)


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=SEEDS, index=st.integers(0, 10**6))
def test_seed_and_round_alone_decide_the_paths(space, seed, index):
    paths = fair_round(space, seed, index)
    random.random()  # the module's own generator plays no part
    assert fair_round(Space.from_json(space.to_json()), seed, index) == paths
    assert uniform_round(space, seed, index) == uniform_round(space, seed, index)


def test_seeds_and_rounds_differ():
    space = space_named("imagenet")
    rounds = [tuple(fair_round(space, seed, index)) for seed in range(3) for index in range(3)]
    assert len(set(rounds)) == 9


def test_every_pair_of_choices_meets():
    """Permutations of blocks are independent: nothing ties the choice of one block to that of another."""
    space = space_named("imagenet")
    paths = fair_archs(space, seed=0, count=18 * 150)
    for a, b in ((0, 1), (0, 18), (7, 8)):
        pairs = Counter((path.operations[a], path.operations[b]) for path in paths)
        possible = 18 * 18 if space.block_cluster[a] != space.block_cluster[b] else 3 * 6 * 6
        assert len(pairs) == possible
        assert max(pairs.values()) < 4 * len(paths) / possible + 10


def test_fair_archs_are_the_first_paths_of_the_rounds():
    space = shrunk_at_random(space_named("imagenet"), random.Random(5))
    count = 2 * space.max_live + 3
    archs = fair_archs(space, seed=9, count=count)
    assert archs == [path for index in range(3) for path in fair_round(space, 9, index)][:count]
    assert fair_archs(space, seed=9, count=0) == []


@settings(max_examples=30, deadline=None)
@given(space=shrunk_spaces(), seed=SEEDS)
def test_uniform_paths_lie_in_the_space(space, seed):
    rng = random.Random(seed)
    for _ in range(20):
        space.check(uniform_arch(space, rng))
    assert len(uniform_round(space, seed, 0)) == space.max_live


def test_uniform_sampling_is_uniform():
    space, rng, draws = space_named("imagenet"), random.Random(1), 18 * 300
    counts = Counter(uniform_arch(space, rng).operations[4] for _ in range(draws))
    assert set(counts) == set(space.live[4])
    chi_squared = sum((count - 300) ** 2 / 300 for count in counts.values())
    assert chi_squared < 40.8  # 99.9 % quantile of 17 degrees of freedom


@settings(max_examples=25, deadline=None)
@given(space=shrunk_spaces(), seed=SEEDS, count=st.integers(1, 7), start=st.integers(0, 1000))
def test_between_largest_and_smallest_a_sandwich_has_the_next_fair_paths(space, seed, count, start):
    rounds = [sandwich_round(space, seed, start + r, count) for r in range(3)]
    fair = [path for paths in rounds for path in paths[1:-1]]
    first, skipped = divmod(start * count, space.max_live)
    whole = [path for r in range(3 * count + 2) for path in fair_round(space, seed, first + r)]
    assert fair == whole[skipped : skipped + 3 * count]
    assert {(paths[0], paths[-1]) for paths in rounds} == {sandwich_ends(space)}
    assert sandwich_round(space, seed, start, count) == rounds[0]


@settings(max_examples=10, deadline=None)
@given(space=shrunk_spaces(), seed=SEEDS)
def test_no_network_is_larger_or_smaller_than_the_ends(space, seed):
    macs = CostModel(space).macs
    largest, smallest = sandwich_ends(space)
    space.check(largest)
    space.check(smallest)
    costs = [macs(arch) for arch in fair_archs(space, seed, 100)]
    assert macs(smallest) <= min(costs)
    assert max(costs) <= macs(largest)
    assert (macs(smallest), macs(largest)) == macs.range()


@pytest.mark.parametrize("live", [("k3w8c4", "k5w4c4"), ("k5w4c4", "k3w8c4")])
def test_of_equally_large_networks_the_one_with_the_larger_kernels_is_the_largest(live):
    row = Row(family="ir", kernels=(3, 5), widths=(4, 8))
    space = Space(table=(Cluster(channels=(4,), rows=(row,)),), resolution=8, input_channels=3, classes=2)
    space = space.with_live([list(map(Operation.parse, live))])
    macs = CostModel(space).macs
    assert len({macs(arch) for arch in fair_round(space, 0, 0)}) == 1  # 8 x (3 + 9 + 4) = 4 x (3 + 25 + 4)
    assert str(sandwich_ends(space)[0]) == "c4:k5w4"
