"""One text per network: equal releases have one canonical text, and it is a text of the space."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.space.arch import Arch
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster, Row
from tests.engine.space.strategies import rows, shrunk_at_random


def released(space: Space, arch: Arch) -> list[tuple]:  # type: ignore[type-arg]
    """Per cluster, its channels and the blocks that are there."""
    plans = iter(space.released_plans(arch))
    blocks = [[next(plans) for _ in blocks] for blocks in space.cluster_blocks]
    pairs = zip(arch.channels, blocks, strict=True)
    return [(channels, tuple(plan for plan in each if plan.layers)) for channels, each in pairs]


def all_archs(space: Space) -> list[Arch]:
    clusters = []
    for j, blocks in enumerate(space.cluster_blocks):
        clusters.append(
            [
                (channels, ops)
                for channels in space.live_channels(j)
                for ops in itertools.product(*(space.live_block_ops(i, channels) for i in blocks))
            ]
        )
    found = itertools.product(*clusters)
    return [Arch(tuple(c for c, _ in parts), tuple(ops for _, ops in parts)) for parts in found]


@settings(max_examples=60, deadline=None)
@given(table=st.lists(rows(families=("ir", "conv", "basic")), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_equal_networks_have_one_text_and_others_another(table, seed):
    space = Space(table=(Cluster(channels=(4, 6), rows=tuple(table)),), resolution=16)
    space = shrunk_at_random(space, random.Random(seed))
    archs = all_archs(space) if space.num_architectures <= 3000 else []
    texts: dict[tuple, set[Arch]] = {}  # type: ignore[type-arg]
    for arch in archs:
        one = canonical(space, arch)
        space.check(one)
        assert canonical(space, one) == one
        assert released(space, one) == released(space, arch)
        texts.setdefault(tuple(released(space, arch)), set()).add(one)
    assert all(len(each) == 1 for each in texts.values())


def space_of(*rows: Row) -> Space:
    return Space(table=(Cluster(channels=(8,), rows=rows),), resolution=16)


A = Row(family="ir", blocks=3, stride=2, kernels=(3, 5), expansions=(3,), identity=True)
B = Row(family="ir", blocks=1, kernels=(5,), expansions=(3,), identity=True)
C = Row(family="ir", blocks=2, kernels=(3, 5), expansions=(3,), identity=True)


@pytest.mark.parametrize(
    ("rows", "text", "expected"),
    [
        ((A,), "c8:k3t3,i,k5t3", "c8:k3t3,k5t3,i"),
        ((A,), "c8:i,i,k5t3", "c8:i,k5t3,i"),  # the first block halves the image: it is never nothing
        ((A,), "c8:k3t3,i,i", "c8:k3t3,i,i"),
        ((A, B), "c8:k3t3,i,k3t3,i", "c8:k3t3,k3t3,i,i"),
        ((A, B), "c8:k3t3,i,i,k5t3", "c8:k3t3,k5t3,i,i"),
        ((C, A), "c8:k3t3,i,k3t3,k5t3,i", "c8:k3t3,i,k3t3,k5t3,i"),  # nothing moves past the halving
        ((C, A), "c8:k3t3,i,k3t3,i,k5t3", "c8:k3t3,i,k3t3,k5t3,i"),
    ],
)
def test_identities_come_last(rows, text, expected):
    space = space_of(*rows)
    assert str(canonical(space, Arch.parse(text))) == expected


def test_where_a_moved_choice_is_not_live_the_first_in_text_order_stands():
    space = space_of(A)
    live = [list(ops) for ops in space.live]
    live[1] = [op for op in live[1] if str(op.block_op) in ("k3t3", "i")]
    live[2] = [op for op in live[2] if str(op.block_op) in ("k5t3", "i")]
    shrunk = space.with_live(live)
    assert str(canonical(shrunk, Arch.parse("c8:k3t3,i,k5t3"))) == "c8:k3t3,i,k5t3"
    assert str(canonical(space, Arch.parse("c8:k3t3,i,k5t3"))) == "c8:k3t3,k5t3,i"


def test_without_identities_a_text_stands_for_itself():
    space = space_of(Row(family="ir", blocks=2, kernels=(3, 5), expansions=(3,)))
    arch = Arch.parse("c8:k3t3,k5t3")
    assert canonical(space, arch) is arch
