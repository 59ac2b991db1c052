"""A prefix tree has each distinct prefix once, and leads every architecture through its own operations."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from tests.engine.evaluation.cases import shrunk_space, small_space

SPACES = [small_space(), shrunk_space(small_space()), space_named("imagenet")]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SPACES), st.integers(1, 60), st.integers())
def test_every_path_from_a_leaf_is_its_architecture(space, count, seed):
    rng = random.Random(seed)
    archs = list(dict.fromkeys(uniform_arch(space, rng) for _ in range(count)))
    tree = PrefixTree(space, archs, space.resolution)
    for i, level in enumerate(tree.levels):
        assert len(level) == len({arch.operations[: i + 1] for arch in archs})
    for leaf, position in enumerate(tree.leaves):
        arch, node = archs[position], leaf
        plans = space.supernet_plans(arch)
        for i in reversed(range(space.num_blocks)):
            step = tree.levels[i].steps[node]
            assert (step.operation, step.plan) == (arch.operations[i], plans[i])
            node = tree.levels[i].parents[node]
    assert sorted(tree.leaves) == list(range(len(archs)))


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SPACES), st.integers(1, 60), st.integers())
def test_children_are_ranges_and_positions_count_nodes_of_a_step(space, count, seed):
    rng = random.Random(seed)
    archs = list(dict.fromkeys(uniform_arch(space, rng) for _ in range(count)))
    tree = PrefixTree(space, archs, space.resolution)
    for level, below in zip(tree.levels, tree.levels[1:], strict=False):
        for node in range(len(level)):
            children = range(level.first_child[node], level.first_child[node + 1])
            assert [child for child in range(len(below)) if below.parents[child] == node] == list(children)
        for members in level.groups(0, len(level)).values():
            assert [level.positions[node] for node in members] == list(range(len(members)))


@pytest.mark.parametrize(("resolution", "sizes"), [(224, (56, 28, 14, 7)), (64, (16, 8, 4, 2)), (33, (9, 5, 3, 2))])
def test_output_sizes_round_up(resolution, sizes):
    space = space_named("imagenet")
    tree = PrefixTree(space, [uniform_arch(space, random.Random(0))], resolution)
    assert tuple(tree.levels[i].out_size for i in (0, 2, 6, 18)) == sizes
    assert [level.in_size for level in tree.levels[1:]] == [level.out_size for level in tree.levels[:-1]]
