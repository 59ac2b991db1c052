"""Fair and uniform sampling of single paths, and the sandwich.

Fair sampling is FairNAS's strict fairness (arXiv 1907.01845) extended to channels that are tied inside a cluster. A
round has as many paths as the largest block has live operations. While all blocks have equally many, a round uses each
of them exactly once. Where they have not, as after shrinking, exact equality is impossible; then two invariants hold
for any window of consecutive rounds: the channel options of a cluster appear within one of each other, and so do the
choices of a block under one channel number.

Both invariants force the *contents* of rounds to be cyclic: of n choices, n consecutive draws must be all different
wherever the window starts. So each list of choices is kept in one random order, round r takes the next ones of it,
and the freedom that is left, which path of the round gets which choice, is drawn anew in each round and block. What is
drawn depends on (space, seed, round) alone: there is no state to save, and every rank draws the same by itself.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Space

Choice = TypeVar("Choice")


def fair_round(space: Space, seed: int, round_index: int) -> list[Arch]:
    """The paths of one round: `space.max_live` architectures, equal for equal arguments."""
    num_paths = space.max_live
    orders = random.Random(f"{seed}/orders")
    shuffles = random.Random(f"{seed}/round/{round_index}")
    channels_of_path: list[list[int]] = [[] for _ in range(num_paths)]
    ops_of_path: list[list[tuple[BlockOp, ...]]] = [[] for _ in range(num_paths)]
    for j, blocks in enumerate(space.cluster_blocks):
        options = _shuffled(space.live_channels(j), orders)
        drawn = _cyclic_window(options, round_index * num_paths, num_paths)
        shuffles.shuffle(drawn)
        used_before = {channels: _count_in_prefix(options, channels, round_index * num_paths) for channels in options}
        choices: dict[int, list[Iterator[BlockOp]]] = {}
        for channels in options:
            count = drawn.count(channels)
            choices[channels] = []
            for i in blocks:
                order = _shuffled(space.live_block_ops(i, channels), orders)
                window = _cyclic_window(order, used_before[channels], count)
                shuffles.shuffle(window)
                choices[channels].append(iter(window))
        for path, channels in enumerate(drawn):
            channels_of_path[path].append(channels)
            ops_of_path[path].append(tuple(next(choice) for choice in choices[channels]))
    return [Arch(tuple(channels), tuple(ops)) for channels, ops in zip(channels_of_path, ops_of_path, strict=True)]


def fair_archs(space: Space, seed: int, count: int) -> list[Arch]:
    """The first `count` paths of the rounds 0, 1, 2, ... (paper, Algorithm 1, lines 5-8)."""
    archs: list[Arch] = []
    round_index = 0
    while len(archs) < count:
        archs += fair_round(space, seed, round_index)
        round_index += 1
    return archs[:count]


def uniform_arch(space: Space, rng: random.Random) -> Arch:
    """Every cluster's channels and every block's choice drawn independently and uniformly (SPOS, arXiv 1904.00420)."""
    channels: list[int] = []
    ops: list[tuple[BlockOp, ...]] = []
    for j, blocks in enumerate(space.cluster_blocks):
        channels.append(rng.choice(space.live_channels(j)))
        ops.append(tuple(rng.choice(space.live_block_ops(i, channels[-1])) for i in blocks))
    return Arch(tuple(channels), tuple(ops))


def uniform_round(space: Space, seed: int, round_index: int) -> list[Arch]:
    """As many uniform paths as a fair round has, equal for equal arguments."""
    rng = random.Random(f"{seed}/uniform/{round_index}")
    return [uniform_arch(space, rng) for _ in range(space.max_live)]


@cache
def sandwich_ends(space: Space) -> tuple[Arch, Arch]:
    """The live networks with the most and the fewest multiply-adds (BigNAS, arXiv 2003.11142).

    Of equally large ones the one with the larger kernels, then the first in the order of the space's operations.
    """
    macs = CostModel(space).macs
    unit = 1 << 16  # above any sum of kernels
    size = replace(
        macs,
        stem=unit * macs.stem,
        block=lambda index, before, channels, op: unit * macs.block(index, before, channels, op) + op.kernel,
        tail=lambda channels: unit * macs.tail(channels),
    )
    return size.best(max)[1], macs.best(min)[1]


def sandwich_round(space: Space, seed: int, round_index: int, count: int) -> list[Arch]:
    """The largest network, the next `count` fair paths, and the smallest; equal for equal arguments."""
    largest, smallest = sandwich_ends(space)
    number, skipped = divmod(round_index * count, space.max_live)
    fair: list[Arch] = []
    while len(fair) < skipped + count:
        fair += fair_round(space, seed, number)
        number += 1
    return [largest, *fair[skipped : skipped + count], smallest]


def _shuffled(options: Sequence[Choice], rng: random.Random) -> list[Choice]:
    return rng.sample(options, len(options))


def _cyclic_window(order: Sequence[Choice], start: int, length: int) -> list[Choice]:
    return [order[(start + offset) % len(order)] for offset in range(length)]


def _count_in_prefix(order: Sequence[Choice], choice: Choice, length: int) -> int:
    """How often `choice` appears in the first `length` elements of `order` repeated for ever."""
    cycles, rest = divmod(length, len(order))
    return cycles + (order.index(choice) < rest)
