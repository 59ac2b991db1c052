"""One text for each network: where a block may be left out, different texts can mean the same. No torch.

An identity that keeps the size vanishes from the released network, so it does not matter which of several equal places
in a row it takes. The canonical text has them last. Where a moved choice is not live there (or rows differ in between),
it is the first in text order of the texts that mean the same network.
"""

from functools import cache

from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.space import Space


def canonical(space: Space, arch: Arch) -> Arch:
    """The architecture whose text stands for all that release the same network."""
    if not space.has_identities:
        return arch
    before = space.entry_channels
    blocks = []
    for channels, indices, ops in zip(arch.channels, space.cluster_blocks, arch.blocks, strict=True):
        vanishing = [
            i for i in indices if space.block_stride(i) == 1 and (before == channels or not space.is_first(i))
        ]  # an identity there is nothing
        moved = _settled(space, vanishing, channels, {i: ops[i - indices.start] for i in vanishing})
        blocks.append(tuple(moved.get(i, op) for i, op in zip(indices, ops, strict=True)))
        before = channels
    return Arch(arch.channels, tuple(blocks))


def _settled(space: Space, places: list[int], channels: int, ops: dict[int, BlockOp]) -> dict[int, BlockOp]:
    """The canonical choices of the places of a cluster at which an identity is nothing."""
    kept = [i for i in places if ops[i].kernel]
    if len(kept) == len(places):
        return ops

    def fits(item: int, place: int) -> bool:
        """Whether the choice of `kept[item]` means the same at a place."""
        same_row = space.block_row(kept[item]).kind == space.block_row(place).kind
        return same_row and ops[kept[item]] in space.live_block_ops(place, channels)

    def may_vanish(place: int) -> bool:
        return BlockOp() in space.live_block_ops(place, channels)

    count = len(kept)
    if all(fits(n, places[n]) for n in range(count)) and all(map(may_vanish, places[count:])):
        chosen: list[int | None] = [*range(count), *[None] * (len(places) - count)]
    else:
        chosen = _first_in_text_order(len(places), count, fits, may_vanish, places, [str(ops[i]) for i in kept])
    return {place: BlockOp() if n is None else ops[kept[n]] for place, n in zip(places, chosen, strict=True)}


def _first_in_text_order(length, count, fits, may_vanish, places, texts):  # type: ignore[no-untyped-def]
    """Per place the number of the choice that it takes, or None for an identity."""

    @cache
    def possible(place: int, item: int) -> bool:
        """Whether the choices from `item` on find room in the places from `place` on."""
        if place == length:
            return item == count
        takes = item < count and fits(item, places[place]) and possible(place + 1, item + 1)
        return takes or (may_vanish(places[place]) and possible(place + 1, item))

    chosen: list[int | None] = []
    item = 0
    for place in range(length):
        takes = item < count and fits(item, places[place]) and possible(place + 1, item + 1)
        vanishes = may_vanish(places[place]) and possible(place + 1, item)
        if takes and (not vanishes or texts[item] < str(BlockOp())):
            chosen.append(item)
            item += 1
        else:
            chosen.append(None)
    return chosen
