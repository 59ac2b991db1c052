"""Step-shrinking: R_i by hand, and what holds for every shrunk space (paper, Algorithm 1)."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limited_sampling import archs_inside
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import fair_archs, uniform_round
from bsnas.engine.space.shrink import Importance, importance, importance_to_json, shrink, shrink_inside
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from tests.engine.space.strategies import any_spaces

PAIR = mobile_space(
    clusters=(mobile_cluster(blocks=2, kernels=(3, 5), expansions=(2,), channels=(8, 12), stride=1),),
    resolution=8,
)
"""Two blocks of four operations each: kernel 3 or 5, 8 or 12 channels."""
A, B, C, D = (
    Operation(BlockOp(3, 2), 8),
    Operation(BlockOp(5, 2), 8),
    Operation(BlockOp(3, 2), 12),
    Operation(BlockOp(5, 2), 12),
)


def arch(first: Operation, second: Operation) -> Arch:
    assert first.channels == second.channels
    return Arch((first.channels,), ((first.block_op, second.block_op),))


def ratios(first: tuple[float, ...], second: tuple[float, ...]) -> Importance:
    return tuple(dict(zip((A, B, C, D), values, strict=True)) for values in (first, second))


# ---- R_i


def test_importance_of_a_hand_computed_case():
    """Seven models: the best two and the worst two count, with 7 // 3 = 2 to a third."""
    models = [
        (arch(A, A), 0.50),  # middle
        (arch(A, B), 0.90),  # best third
        (arch(B, A), 0.10),  # worst third
        (arch(C, D), 0.80),  # best third
        (arch(C, C), 0.60),  # middle
        (arch(A, A), 0.20),  # worst third
        (arch(D, D), 0.40),  # middle
    ]
    first, second = importance(PAIR, [m[0] for m in models], [m[1] for m in models])
    assert first == {A: (1 - 1) / 3, B: (0 - 1) / 1, C: (1 - 0) / 2, D: 0 / 1}
    assert second == {A: (0 - 2) / 3, B: (1 - 0) / 1, C: 0 / 1, D: (1 - 0) / 2}


def test_ties_are_broken_by_the_drawing_order():
    archs = [arch(A, A), arch(B, B), arch(C, C)]
    first, _ = importance(PAIR, archs, [0.5, 0.5, 0.5])
    assert first == {A: 1.0, B: 0.0, C: -1.0, D: 0.0}
    first, _ = importance(PAIR, archs[::-1], [0.5, 0.5, 0.5])
    assert first == {A: -1.0, B: 0.0, C: 1.0, D: 0.0}


def test_an_operation_that_no_model_uses_has_no_importance():
    first, second = importance(PAIR, [arch(A, A)] * 3, [0.1, 0.2, 0.3])
    assert first == second == {A: 0.0, B: 0.0, C: 0.0, D: 0.0}
    first, _ = importance(PAIR, [arch(A, A), arch(B, B)], [0.1, 0.9])  # a third of two models is none
    assert set(first.values()) == {0.0}


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=st.integers(0, 1000), rounds=st.integers(1, 4))
def test_importance_equals_its_definition(space, seed, rounds):
    rng = random.Random(seed)
    archs = fair_archs(space, seed, space.max_live * rounds)
    top1 = [rng.choice((0.1, 0.2, 0.3, 0.4)) for _ in archs]
    ranked = [archs[i] for _, i in sorted((-score, i) for i, score in enumerate(top1))]
    third = len(ranked) // 3
    top, bottom = ranked[:third], ranked[len(ranked) - third :]
    for i, block in enumerate(importance(space, archs, top1)):
        assert set(block) == set(space.live[i])
        for op, ratio in block.items():
            uses = [sum(a.operations[i] == op for a in group) for group in (ranked, top, bottom)]
            assert ratio == ((uses[1] - uses[2]) / uses[0] if uses[0] else 0)


def test_importance_as_json():
    assert importance_to_json(ratios((0.5, 0, 0, -1), (0, 0, 0, 0.25))) == [
        {"k3t2c8": 0.5, "k5t2c8": 0, "k3t2c12": 0, "k5t2c12": -1},
        {"k3t2c8": 0, "k5t2c8": 0, "k3t2c12": 0, "k5t2c12": 0.25},
    ]


# ---- which operations stay


@pytest.mark.parametrize(
    ("keep", "first", "second", "expected"),
    [
        # The largest ones stay, and only positive ones.
        (2, (0.9, 0.1, 0.8, -0.5), (0.3, 0.0, 0.4, 0.2), ((A, C), (A, C))),
        (4, (0.9, 0.1, 0.8, -0.5), (0.3, 0.0, 0.4, 0.2), ((A, B, C), (A, C, D))),
        (9, (1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), ((A, B, C, D), (A, B, C, D))),
        # None is positive: the best one stays.
        (3, (-0.1, -0.2, -0.3, -0.4), (0.0, 0.0, 0.0, 0.0), ((A,), (A,))),
        # The second block is the spring block: the first one loses the channels that the spring block lost.
        (3, (0.1, 0.2, 0.3, -0.4), (0.5, 0.6, -0.1, -0.1), ((A, B), (A, B))),
        # The first block has no operation for 12 channels: they go from the spring block too.
        (3, (0.1, 0.2, -0.3, -0.4), (0.5, 0.6, 0.7, -0.1), ((A, B), (A, B))),
        # No channels in common. Means over the cluster: 8 has (.5 + .4 - .9 - .8) / 4, 12 has (-.1 - .2 + .3 + .2) / 4.
        (2, (0.5, 0.4, -0.1, -0.2), (-0.9, -0.8, 0.3, 0.2), ((C,), (C, D))),
        # The same the other way round; the spring block gets its best operation of 8 channels.
        (2, (0.5, 0.4, -0.1, -0.2), (-0.2, -0.1, 0.3, 0.2), ((A, B), (B,))),
        # N_r = 1.
        (1, (0.5, 0.4, -0.1, -0.2), (0.2, 0.1, 0.3, 0.2), ((A,), (A,))),
        (1, (0.5, 0.4, 0.3, 0.2), (0.2, 0.3, 0.1, 0.2), ((A,), (B,))),
    ],
)
def test_what_stays(keep, first, second, expected):
    smaller = shrink(PAIR, ratios(first, second), keep)
    assert [set(ops) for ops in smaller.live] == [set(ops) for ops in expected]


@st.composite
def measured_spaces(draw) -> tuple[Space, Importance]:
    """A space and an R_i of every live operation, rich in ties, zeros and negative values."""
    space = draw(any_spaces())
    rng = random.Random(draw(st.integers(0, 2**32)))
    values = draw(st.sampled_from([(-1.0, 1.0), (-1.0, -0.5, 0.0), (0.25, 0.5, 1.0), (-1.0, -0.1, 0.0, 0.1, 0.2, 1.0)]))
    return space, tuple({op: rng.choice(values) for op in live} for live in space.live)


@settings(max_examples=60, deadline=None)
@given(measured=measured_spaces(), keep=st.integers(1, 12))
def test_what_holds_for_every_shrunk_space(measured, keep):
    space, measured_ratios = measured
    smaller = shrink(space, measured_ratios, keep)
    assert smaller.full() == space.full()
    assert smaller.num_architectures >= 1
    for j, blocks in enumerate(space.cluster_blocks):
        channels = set(smaller.live_channels(j))
        assert channels <= set(space.live_channels(j))
        for i in blocks:
            live, block_ratios = smaller.live[i], measured_ratios[i]
            assert 1 <= len(live) <= keep
            assert set(live) <= set(space.live[i])
            assert {op.channels for op in live} == channels
            # Only R_i > 0 stays, unless nothing else was there to stay.
            if any(block_ratios[op] <= 0 for op in live):
                assert len(live) == 1
            # Of one channel number, those that went are no better than those that stayed.
            for c in channels:
                stayed = [block_ratios[op] for op in live if op.channels == c]
                went = [r for op, r in block_ratios.items() if op.channels == c and op not in live]
                assert not went or max(went) <= min(stayed)


@settings(max_examples=40, deadline=None)
@given(measured=measured_spaces(), keep=st.integers(1, 12))
def test_every_surviving_operation_can_be_reached(measured, keep):
    smaller = shrink(*measured, keep)
    for i, live in enumerate(smaller.live):
        cluster = smaller.block_cluster[i]
        for op in live:
            picked = {
                c: op.channels if c == cluster else smaller.live_channels(c)[0] for c in range(len(smaller.clusters))
            }
            blocks = [
                tuple(
                    op.block_op if b == i else smaller.live_block_ops(b, picked[c])[0]
                    for b in smaller.cluster_blocks[c]
                )
                for c in picked
            ]
            smaller.check(Arch(tuple(picked.values()), tuple(blocks)))


@settings(max_examples=25, deadline=None)
@given(measured=measured_spaces())
def test_one_operation_per_block_leaves_one_network(measured):
    smaller = shrink(*measured, 1)
    assert smaller.num_architectures == 1
    assert smaller.max_live == 1
    assert len(set(uniform_round(smaller, 0, 0) + fair_archs(smaller, 1, 3))) == 1


@settings(max_examples=40, deadline=None)
@given(measured=measured_spaces(), keep=st.integers(1, 12))
def test_channels_survive_where_spring_block_and_all_others_keep_them(measured, keep):
    """Rule 4 from the definition: what each block keeps by rule 3, cut to the channels that all blocks keep."""
    space, measured_ratios = measured
    smaller = shrink(space, measured_ratios, keep)
    for j, blocks in enumerate(space.cluster_blocks):
        kept = []
        for i in blocks:
            order = sorted(space.live[i], key=lambda op, i=i: measured_ratios[i][op], reverse=True)
            positive = [op for op in order[:keep] if measured_ratios[i][op] > 0]
            kept.append(positive or order[:1])
        common = set.intersection(*({op.channels for op in ops} for ops in kept))
        if common:
            assert set(smaller.live_channels(j)) == common
            for i, ops in zip(blocks, kept, strict=True):
                assert set(smaller.live[i]) == {op for op in ops if op.channels in common}
        else:
            assert len(smaller.live_channels(j)) == 1
            (channels,) = smaller.live_channels(j)
            means = {c: mean_ratio(measured_ratios, blocks, c) for c in space.live_channels(j)}
            assert means[channels] == max(means.values())


def mean_ratio(measured: Importance, blocks: range, channels: int) -> float:
    values = [ratio for i in blocks for op, ratio in measured[i].items() if op.channels == channels]
    return sum(values) / len(values)


def test_the_paper_shrinks_to_its_numbers_step_by_step():
    space = mobile_space(
        clusters=tuple(
            mobile_cluster(blocks=blocks, kernels=(3, 5, 7), expansions=(3, 6), channels=(8, 12, 16), stride=1)
            for blocks in (2, 4, 1)
        ),
        resolution=8,
    )
    rng = random.Random(0)
    sizes = [space.num_architectures]
    for keep in (9, 5, 3, 1):
        archs = fair_archs(space, 0, space.max_live * 20)
        space = shrink(space, importance(space, archs, [rng.random() for _ in archs]), keep)
        assert space.max_live <= keep
        sizes.append(space.num_architectures)
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] == 1
    assert all(isinstance(op, BlockOp) for op in fair_archs(space, 0, 1)[0].flat_blocks)


# ---- inside a budget


def test_a_step_keeps_networks_inside_a_budget_reachable():
    space = space_named("digits")
    archs = fair_archs(space, 0, 200)
    costs = CostModel(space)
    small_is_good = importance(space, archs, [-costs.macs(arch) for arch in archs])
    low, high = costs.macs.range()
    near_the_top = Limit("macs", 0.9 * high, high)
    assert CostModel(shrink(space, small_is_good, 5)).macs.range()[1] < near_the_top.low
    (best,) = archs_inside(space, near_the_top, seed=0, count=1)
    after = shrink_inside(space, small_is_good, 5, near_the_top, best)
    after.check(best)
    assert max(map(len, after.live)) <= 6
    whole = Limit("macs", low, high)
    assert shrink_inside(space, small_is_good, 5, whole, best) == shrink(space, small_is_good, 5)


def test_what_a_step_draws_lies_inside_its_budget():
    space = space_named("cifar10")
    limit = Limit("macs", 10e6, 12e6)
    archs = archs_inside(space, limit, seed=1, count=50)
    assert len(archs) == 50
    assert all(limit.allows(CostModel(space).macs(arch)) for arch in archs)
    assert archs == archs_inside(space, limit, seed=1, count=50)
    assert archs != archs_inside(space, limit, seed=2, count=50)
