"""The search space: sizes, architectures as text, JSON, widths, and every error."""

import copy
import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsnas.engine.host.errors import UserError
from bsnas.engine.presets import PRESETS, preset
from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.plan import Plan
from bsnas.engine.space.sampling import fair_archs, uniform_round
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named
from tests.engine.space.strategies import any_spaces
from tests.engine.tiny import ARCH, TINY, tiny_space

# ---- sizes


def test_the_papers_table():
    space = space_named("imagenet")
    assert space.num_blocks == 19
    assert space.num_architectures == 3**6 * 6**19
    assert space.max_live == 18
    assert all(len(ops) == 18 for ops in space.live)
    assert [space.live_channels(j) for j in range(6)] == [
        (24, 32, 40), (40, 48, 56), (64, 72, 80), (96, 112, 128), (160, 192, 224), (240, 280, 320)
    ]  # fmt: skip
    assert [i for i in range(19) if space.block_stride(i) == 2] == [0, 2, 6, 14]
    assert [i for i in range(19) if space.is_first(i)] == [0, 2, 6, 10, 14, 18]
    assert [i for i in range(19) if space.is_spring(i)] == [1, 5, 9, 13, 17]


def test_numbers_of_architectures_of_other_spaces():
    assert space_named("mobilenet-v2").num_architectures == 1
    assert space_named("digits").num_architectures == 3**4 * 6**8
    assert TINY.num_architectures == (2 * 4**2) * 2 * 2
    live = [list(ops) for ops in TINY.live]
    live[0] = [op for op in live[0] if op != Operation(BlockOp(3, 2), 12)]
    live[1] = [op for op in live[1] if op.channels == 8 or op.block_op.kernel == 5]
    assert TINY.with_live(live).num_architectures == (4 * 4 + 3 * 2) * 2 * 2
    assert TINY.with_live(live).full() == TINY


@pytest.mark.parametrize("name", PRESETS)
def test_preset_spaces_fit_their_data(name):
    config = preset(name)
    assert config.space.resolution == config.data.resolution
    assert config.space.max_live == (28 if name == "cifar10" else 18)


# ---- widths


def sizes(plans: Iterable[Plan]) -> list[tuple[int, ...]]:
    """Inputs, hidden width, outputs, kernel and stride of inverted residuals."""
    return [(p.layers[0].inputs, p.hidden, p.layers[-1].outputs, p.kernel, p.stride) for p in plans]


def test_widths_in_the_supernet_and_released():
    assert sizes(TINY.supernet_plans(ARCH)) == [
        (4, 8, 8, 3, 2),
        (8, 24, 12, 5, 1),  # a spring block puts out the largest option
        (12, 24, 16, 3, 1),  # a cluster of one block puts out the choice
        (16, 72, 20, 5, 2),  # and what follows reads it, hidden width that of the largest: 3 x 24
        (20, 60, 32, 5, 1),
    ]
    assert sizes(TINY.released_plans(ARCH)) == [
        (4, 8, 8, 3, 2),
        (8, 24, 8, 5, 1),
        (8, 16, 16, 3, 1),
        (16, 48, 20, 5, 2),
        (20, 60, 20, 5, 1),
    ]
    assert [plan.shortcut for plan in TINY.supernet_plans(ARCH)] == [None] * 5
    shortcuts = [plan.shortcut for plan in TINY.released_plans(ARCH)]
    assert shortcuts == [None, "identity", None, None, "identity"]


@settings(max_examples=30, deadline=None)
@given(space=any_spaces())
def test_both_widths_agree_when_all_channels_are_the_largest(space):
    for arch in uniform_round(space.full(), 0, 0):
        largest = Arch(tuple(max(cluster.channels) for cluster in space.clusters), arch.blocks)
        assert space.supernet_plans(largest) == space.released_plans(largest)


@settings(max_examples=30, deadline=None)
@given(space=any_spaces())
def test_with_sliced_springs_both_widths_always_agree(space):
    for arch in uniform_round(replace(space, springs="sliced"), 0, 0):
        sliced = replace(space, springs="sliced")
        assert sliced.supernet_plans(arch) == sliced.released_plans(arch)


# ---- architectures as text


@settings(max_examples=25, deadline=None)
@given(space=any_spaces(), seed=st.integers(0, 1000))
def test_architectures_survive_their_text(space, seed):
    for arch in fair_archs(space, seed, count=5):
        again = Arch.parse(str(arch))
        assert again == arch
        assert hash(again) == hash(arch)
        assert again.operations == arch.operations
        assert Arch.parse(f"  {arch}\n") == arch


def test_the_text_is_readable():
    text = "c8:k3t2,k5t3_c16:k3t2_c20:k5t3,k5t3"
    assert str(ARCH) == text
    assert Arch.parse(text) == ARCH
    assert ARCH.flat_blocks == (BlockOp(3, 2), BlockOp(5, 3), BlockOp(3, 2), BlockOp(5, 3), BlockOp(5, 3))
    assert [str(op) for op in ARCH.operations] == ["k3t2c8", "k5t3c8", "k3t2c16", "k5t3c20", "k5t3c20"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "''"),
        ("_", "''"),
        ("c24", "'c24'"),
        ("c24:", "'c24:'"),
        ("c24:t3", "'c24:t3'"),
        ("c24:k3t3,", "'c24:k3t3,'"),
        ("c24:k3t3_", "''"),
        ("c24:k3t3_c:k3t3", "'c:k3t3'"),
        ("c24:k3t3 c24:k3t3", "'c24:k3t3 c24:k3t3'"),
        ("c-4:k3t3", "'c-4:k3t3'"),
        ("c24:k3t3.5", "'c24:k3t3.5'"),
        ("c٢٤:k3t3", "'c٢٤:k3t3'"),
        ("c" + "9" * 5000 + ":k3t3", "'c" + "9" * 39 + "'"),
    ],
)
def test_text_that_does_not_parse(text, where):
    with pytest.raises(UserError, match="does not parse at") as raised:
        Arch.parse(text)
    assert where in str(raised.value)
    assert "write each cluster as cCHANNELS:kKERNELtEXPANSION" in str(raised.value)
    assert len(str(raised.value)) < 350
    assert "\n" not in str(raised.value)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="ckwtirm0123456789:,_ x-\n", max_size=40))
def test_any_text_parses_to_itself_or_is_refused(text):
    try:
        arch = Arch.parse(text)
    except UserError:
        return
    assert Arch.parse(str(arch)) == arch


# ---- check


@settings(max_examples=30, deadline=None)
@given(space=any_spaces())
def test_architectures_outside_the_shrunk_space_are_refused(space):
    for arch in uniform_round(space.full(), 1, 0):
        inside = all(op in live for op, live in zip(arch.operations, space.live, strict=True))
        if inside:
            space.check(arch)
        else:
            with pytest.raises(UserError, match="allowed are"):
                space.check(arch)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (
            Arch.parse("c8:k3t2_c16:k3t2_c20:k5t3,k5t3"),
            r"has clusters of \(1, 1, 2\) blocks; this space has \(2, 1, 2\)",
        ),
        (Arch.parse("c8:k3t2,k5t3"), r"has clusters of \(2,\) blocks"),
        (replace(ARCH, channels=(8, 17, 20)), "cluster 2 of architecture .* has 17 channels; allowed are 16, 24"),
        (
            Arch.parse("c8:k3t2,k7t3_c16:k3t2_c20:k5t3,k5t3"),
            "block 2 of architecture .* is k7t3; with 8 channels allowed are k3t2, k3t3, k5t2, k5t3",
        ),
    ],
)
def test_check_says_what_is_wrong_and_allowed(arch, message):
    TINY.check(ARCH)
    with pytest.raises(UserError, match=message):
        TINY.check(arch)


# ---- the table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": 0}, "a cluster has 0 blocks; at least 1 is needed"),
        ({"stride": 3}, "a cluster has stride 3; allowed are 1 and 2"),
        ({"kernels": ()}, r"kernels \(\) of a cluster: give one or more different positive integers"),
        ({"expansions": (3, 3)}, r"expansions \(3, 3\) of a cluster"),
        ({"kernels": (3, 4)}, r"kernels \(3, 4\) of a cluster: kernel sizes must be odd"),
    ],
)
def test_rows_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(TINY.clusters[0].rows[0], **changes)


def test_clusters_that_cannot_be():
    with pytest.raises(UserError, match=r"channels \(0, 8\) of a cluster"):
        replace(TINY.clusters[0], channels=(0, 8))
    with pytest.raises(UserError, match="a cluster has no blocks"):
        replace(TINY.clusters[0], rows=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": ()}, "a space needs at least one cluster"),
        ({"stem_stride": 4}, "stride 4; allowed are 1 and 2"),
        ({"stem_stride": True}, "stride True; allowed are 1 and 2"),
        ({"springs": "loose"}, "springs 'loose' of a space; allowed are fixed and sliced"),
        ({"classes": 2.5}, "classes of a space is 2.5; it must be a positive integer"),
        ({"resolution": 0}, "resolution of a space is 0; it must be a positive integer"),
        ({"classes": -1}, "classes of a space is -1; it must be a positive integer"),
        ({"tail_channels": 0}, r"channels \(0,\) of a cluster"),
        ({"live": TINY.live[:3]}, "a space of 5 blocks got live operations for 3"),
        ({"live": ((), *TINY.live[1:])}, "live operations of block 1 must be different ones of its cluster.* got none"),
        ({"live": ((Operation(BlockOp(9, 9), 8),), *TINY.live[1:])}, "live operations of block 1 .* got k9t9c8"),
        ({"live": (TINY.live[0] * 2, *TINY.live[1:])}, "live operations of block 1 must be different"),
        (
            {"live": ((Operation(BlockOp(3, 2), 8),), *TINY.live[1:])},
            "the blocks of cluster 1 keep different channel numbers; they must agree",
        ),
    ],
)
def test_spaces_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        tiny_space(**changes)


# ---- files


@settings(max_examples=25, deadline=None)
@given(space=any_spaces())
def test_a_space_survives_json(space):
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.fingerprint == space.fingerprint == space.full().fingerprint


def test_a_space_that_the_old_form_cannot_say_has_a_fingerprint_too():
    """It has a stem of two clusters and a tail, but blocks that may be left out."""
    (row,) = TINY.clusters[0].rows
    other = TINY.with_clusters([replace(TINY.clusters[0], rows=(replace(row, identity=True),))])
    assert other.fingerprint != TINY.with_clusters(TINY.clusters[:1]).fingerprint
    assert Space.from_json(other.to_json()).live_fingerprint == other.live_fingerprint


def test_the_fingerprint_is_that_of_the_table():
    assert len(TINY.fingerprint) == 64
    others = [tiny_space(classes=5), tiny_space(clusters=TINY.clusters[:2]), tiny_space(tail_channels=41)]
    assert len({TINY.fingerprint, *(other.fingerprint for other in others)}) == 4


JUNK = st.sampled_from(
    [None, True, -1, 0, 2.5, 1e308, "", "16", "k3t2c8", "k3t2", [], [[]], [None], {}, [-3], ["a"], [8.5], {"a": 1}]
)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_is_another_proper_space(data):
    """One value anywhere in the file is replaced or removed: a `UserError`, or a space of integers that works."""
    table = copy.deepcopy(TINY.to_json())
    node = table
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        break
    if data.draw(st.booleans()):
        del node[key]
    else:
        node[key] = data.draw(JUNK)
    try:
        space = Space.from_json(table)
    except UserError:
        return
    plans = [plan for arch in fair_archs(space, 0, 2) for plan in (*space.stem_plans, *space.supernet_plans(arch))]
    layers = [layer for plan in plans for layer in plan.convs]
    widths = [size for layer in layers for size in (layer.inputs, layer.outputs, layer.kernel, layer.stride)]
    fixed = [space.resolution, space.classes, space.input_channels]
    assert all(type(number) is int and number > 0 for number in (*widths, *fixed))
    assert Space.from_json(space.to_json()) == space


@pytest.mark.parametrize("junk", [None, 3, "text", [], [1, 2], {}, {"clusters": 3}, {"clusters": [], "live": []}])
def test_other_json_is_no_space(junk):
    with pytest.raises(UserError):
        Space.from_json(junk)


def test_what_is_no_space_says_why():
    with pytest.raises(UserError, match="this is not a search space: 'live'; give a file that this program wrote"):
        Space.from_json({})
    table = TINY.to_json()
    table["live"][0][0] = "k3t2"
    with pytest.raises(
        UserError, match="operation 'k3t2' does not parse; write kKERNELtEXPANSIONcCHANNELS, as k5t3c40"
    ):
        Space.from_json(table)
    with pytest.raises(UserError, match=r"this is not a search space: .*colour"):
        Space.from_json({**TINY.to_json(), "colour": 3})


def test_an_unknown_preset():
    allowed = "digits, fashion-mnist, cifar10, imagenet"
    with pytest.raises(UserError, match=f"preset 'cifar' is unknown; allowed are {allowed}"):
        preset("cifar")
