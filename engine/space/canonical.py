"""One text for each network: where a block may be left out, different texts can mean the same. No torch.

An identity that keeps the size vanishes from the released network, so it does not matter which of several equal places
in a row it takes. The canonical text has them last. Where a moved choice is not live there (or rows differ in between),
it is the first in text order of the texts that mean the same network.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby

from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.space import Space

Choices = dict[int, BlockOp]
"""What blocks choose."""


def canonical(space: Space, arch: Arch) -> Arch:
    """The architecture whose text stands for all of its clusters that release the same blocks."""
    if not space.has_identities:
        return arch
    before = space.entry_channels
    blocks = []
    for channels, indices, ops in zip(arch.channels, space.cluster_blocks, arch.blocks, strict=True):
        chosen = dict(zip(indices, ops, strict=True))
        for keeps, run in groupby(indices, key=lambda i: _keeps_size(space, i, before, channels)):
            places = list(run)  # nothing moves past a block that changes the size
            if keeps and any(not chosen[i].kernel for i in places):  # an identity there is nothing
                chosen |= _settled(space, places, channels, chosen)
        blocks.append(tuple(chosen.values()))
        before = channels
    return Arch(arch.channels, tuple(blocks))


def _keeps_size(space: Space, block: int, before: int, channels: int) -> bool:
    """Whether a block behind `before` channels puts out what it reads, so that an identity vanishes."""
    return space.block_stride(block) == 1 and (before == channels or not space.is_first(block))


def _settled(space: Space, places: Sequence[int], channels: int, chosen: Choices) -> Choices:
    """The canonical choices of neighbouring places at which an identity is nothing."""
    wanted = [
        space.released_plan(i, channels, Operation(chosen[i], channels)) for i in places if chosen[i].kernel
    ]  # the blocks that are there, in order

    @cache
    def taking(item: int, place: int) -> BlockOp | None:
        """The choice that is the wanted block at a place, if there is one."""
        live = space.live_block_ops(places[place], channels)
        same = (
            op for op in live
            if op.kernel and space.released_plan(places[place], channels, Operation(op, channels)) == wanted[item]
        )  # fmt: skip
        return next(same, None)

    def may_vanish(place: int) -> bool:
        return BlockOp() in space.live_block_ops(places[place], channels)

    @cache
    def possible(place: int, item: int) -> bool:
        """Whether the blocks from `item` on find room in the places from `place` on."""
        if place == len(places):
            return item == len(wanted)
        takes = item < len(wanted) and taking(item, place) is not None and possible(place + 1, item + 1)
        return takes or (may_vanish(place) and possible(place + 1, item))

    packed = [taking(n, n) for n in range(len(wanted))]
    if None not in packed and all(map(may_vanish, range(len(wanted), len(places)))):
        last = [op for op in packed if op is not None]
        return dict(zip(places, [*last, *[BlockOp()] * (len(places) - len(last))], strict=True))
    result, item = {}, 0
    for place, block in enumerate(places):
        op = taking(item, place) if item < len(wanted) and possible(place + 1, item + 1) else None
        vanishes = may_vanish(place) and possible(place + 1, item)
        if op is not None and not (vanishes and str(BlockOp()) < str(op)):
            result[block] = op
            item += 1
        else:
            result[block] = BlockOp()
    return result
