"""Crossover and mutation of architectures: pure functions of (space, parents, generator).

The genes are the channels of every cluster and the (kernel, expansion) of every block. After shrinking, what a block
may choose depends on its cluster's channels, so a child's channels are settled first; a block whose gene is not live
under them is mended.
"""

import random
from collections.abc import Sequence

from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.space import Space


def crossover(space: Space, parents: Sequence[Arch], rng: random.Random) -> Arch:
    """A child of two parents that takes every gene from one or the other, each with probability 1/2.

    A block's gene that is not live under the child's channels gives way to the other parent's, and if neither is live,
    to a random live one. The child is always an architecture of the space.
    """
    mother, father = parents
    channels = tuple(rng.choice(pair) for pair in zip(mother.channels, father.channels, strict=True))
    ops = []
    for i, genes in enumerate(zip(mother.flat_blocks, father.flat_blocks, strict=True)):
        first, second = genes if rng.random() < 0.5 else genes[::-1]
        ops.append(_live(space, i, channels, (first, second), rng))
    return _arch(space, channels, ops)


def mutate(space: Space, parent: Arch, rng: random.Random, probability: float) -> Arch:
    """A copy of the parent in which every gene is drawn anew, among all live values, with the given probability.

    A block's kept gene that is not live under new channels is drawn anew too.
    """
    channels = tuple(
        rng.choice(space.live_channels(j)) if rng.random() < probability else kept
        for j, kept in enumerate(parent.channels)
    )
    ops = []
    for i, kept in enumerate(parent.flat_blocks):
        ops.append(_live(space, i, channels, () if rng.random() < probability else (kept,), rng))
    return _arch(space, channels, ops)


def _live(space: Space, block: int, channels: Sequence[int], wanted: Sequence[BlockOp], rng: random.Random) -> BlockOp:
    """The first wanted choice that is live under the channels of the block's cluster, else a random live one."""
    live = space.live_block_ops(block, channels[space.block_cluster[block]])
    return next((op for op in wanted if op in live), None) or rng.choice(live)


def _arch(space: Space, channels: tuple[int, ...], ops: Sequence[BlockOp]) -> Arch:
    return Arch(channels, tuple(tuple(ops[blocks.start : blocks.stop]) for blocks in space.cluster_blocks))
