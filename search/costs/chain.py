"""Costs that are sums over blocks, taken apart.

MACs, parameters and a latency model that adds up operations have one structure: what a block contributes depends on its
(kernel, expansion) and on the channels before and after it. Such a cost is a chain over the blocks, and its extremes
and its distribution come from dynamic programming.
"""

from collections.abc import Callable, Iterable, Sequence

from bsnas.engine.space.space import Arch, BlockOp, Space
from bsnas.search.costs.constraints import Cost

Link = tuple[int | None, int]
"""The channels of the clusters of the block before and of the block itself; None before the first block."""


class ChainCost:
    """The terms of an additive cost over the live operations of a space.

    The terms are read off the cost itself by changing one block at a time in a reference architecture, so any additive
    cost will do; about 600 evaluations for Table 1.
    """

    def __init__(self, space: Space, cost: Cost) -> None:
        reference = [(space.live_channels(j)[0], _first_ops(space, j)) for j in range(len(space.clusters))]

        def cost_with(*changes: tuple[int, int, Sequence[BlockOp]]) -> float:
            choices = list(reference)
            for cluster, channels, ops in changes:
                choices[cluster] = (channels, tuple(ops))
            return cost(Arch(tuple(c for c, _ in choices), tuple(ops for _, ops in choices)))

        self.constant = cost_with()
        self.terms: list[dict[Link, dict[BlockOp, float]]] = []
        """Per block and link, what each live choice of the block adds."""
        for i, j in enumerate(space.block_cluster):
            place = i - space.cluster_blocks[j][0]
            terms: dict[Link, dict[BlockOp, float]] = {}
            for before, channels in links(space, i):
                ops = _first_ops(space, j, channels)
                unchanged: tuple[tuple[int, int, Sequence[BlockOp]], ...] = ((j, channels, ops),)
                context: tuple[tuple[int, int, Sequence[BlockOp]], ...] = ()
                if space.is_first(i):
                    if before is not None:
                        context = ((j - 1, before, _first_ops(space, j - 1, before)),)
                    unchanged = context
                without = cost_with(*unchanged)
                terms[before, channels] = {
                    op: cost_with(*context, (j, channels, (*ops[:place], op, *ops[place + 1 :]))) - without
                    for op in space.live_block_ops(i, channels)
                }
            self.terms.append(terms)

    def range(self) -> tuple[float, float]:
        """The smallest and largest cost of a live architecture."""
        return self._extreme(min), self._extreme(max)

    def smallest(self, space: Space) -> Arch:
        """The live architecture of the smallest cost."""
        best: dict[int | None, tuple[float, list[tuple[int, BlockOp]]]] = {None: (self.constant, [])}
        for terms in self.terms:
            reached: dict[int | None, tuple[float, list[tuple[int, BlockOp]]]] = {}
            for (before, channels), choices in terms.items():
                op = min(choices, key=lambda op: choices[op])
                cost, path = best[before]
                if channels not in reached or cost + choices[op] < reached[channels][0]:
                    reached[channels] = (cost + choices[op], [*path, (channels, op)])
            best = reached
        path = min(best.values(), key=lambda found: found[0])[1]
        blocks = [[path[i] for i in indices] for indices in space.cluster_blocks]
        return Arch(
            tuple(cluster[0][0] for cluster in blocks), tuple(tuple(op for _, op in cluster) for cluster in blocks)
        )

    def _extreme(self, pick: Callable[[Iterable[float]], float]) -> float:
        best: dict[int | None, float] = {None: self.constant}
        for terms in self.terms:
            reached: dict[int | None, list[float]] = {}
            for (before, channels), choices in terms.items():
                reached.setdefault(channels, []).append(best[before] + pick(choices.values()))
            best = {channels: pick(values) for channels, values in reached.items()}
        return pick(best.values())


def links(space: Space, block: int) -> list[Link]:
    """The channels that a block can see: any pair at the first block of a cluster, the same number twice inside."""
    cluster = space.block_cluster[block]
    own = space.live_channels(cluster)
    if not space.is_first(block):
        return [(channels, channels) for channels in own]
    before: Sequence[int | None] = space.live_channels(cluster - 1) if cluster else (None,)
    return [(b, channels) for b in before for channels in own]


def _first_ops(space: Space, cluster: int, channels: int | None = None) -> tuple[BlockOp, ...]:
    """The first live choice of every block of a cluster."""
    channels = space.live_channels(cluster)[0] if channels is None else channels
    return tuple(space.live_block_ops(i, channels)[0] for i in space.cluster_blocks[cluster])
