"""What released networks cost, block by block: MACs, parameters and peak activation memory. No torch.

A cost is what the stem, each block and the tail contribute, added up or the largest of them. So its extremes come from
dynamic programming over the blocks, and random architectures of a wanted cost can be drawn without rejection.
"""

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from bsnas.engine.space.space import Arch, BlockDims, BlockOp, Space

Place = tuple[int, int, int, BlockOp]
"""A block of a released network: its index, the channels before and after it, and its choice."""
Pick = Callable[..., Any]
"""`min` or `max`."""

BYTES = 4
"""Of an activation in fp32."""


@dataclass(frozen=True)
class Cost:
    """One cost of the released networks of a space: called with an architecture, it tells its cost."""

    space: Space
    combine: Callable[[float, float], float]
    """`operator.add`, or `max` for a cost that is that of the costliest part."""
    stem: float
    block: Callable[[int, int, int, BlockOp], float]
    """Of a `Place`."""
    tail: Callable[[int], float]
    """Behind a last cluster of so many channels."""
    constant: float = 0
    """What every network costs beside its parts, as a call to a backend; added last."""

    def __call__(self, arch: Arch) -> float:
        total = self.stem
        for place in places_of(self.space, arch):
            total = self.combine(total, self.block(*place))
        return self.constant + self.combine(total, self.tail(arch.channels[-1]))

    @property
    def adds(self) -> bool:
        """Whether it is a sum over the parts, and not the largest of them."""
        return self.combine is operator.add

    def best(self, pick: Pick) -> tuple[float, Arch]:
        """The smallest (`pick` is `min`) or largest (`max`) cost of a live architecture, and the first that has it."""
        best: dict[int, tuple[float, tuple[Place, ...]]] = {self.space.separable_channels: (self.stem, ())}
        for i in range(self.space.num_blocks):
            found: dict[int, list[tuple[float, tuple[Place, ...]]]] = {}
            for before, channels in links(self.space, i):
                cost, places = best[before]
                for op in self.space.live_block_ops(i, channels):
                    place = i, before, channels, op
                    found.setdefault(channels, []).append((self.combine(cost, self.block(*place)), (*places, place)))
            best = {channels: pick(ways, key=itemgetter(0)) for channels, ways in found.items()}
        ends = [(self.combine(cost, self.tail(c)), places) for c, (cost, places) in best.items()]
        cost, places = pick(ends, key=itemgetter(0))
        clusters = [[places[i] for i in blocks] for blocks in self.space.cluster_blocks]
        widths, ops = [blocks[0][2] for blocks in clusters], [tuple(op for *_, op in blocks) for blocks in clusters]
        return self.constant + cost, Arch(tuple(widths), tuple(ops))

    def range(self) -> tuple[float, float]:
        """The smallest and largest cost of a live architecture."""
        return self.best(min)[0], self.best(max)[0]


def places_of(space: Space, arch: Arch) -> Iterator[Place]:
    """The blocks of an architecture's released network in order."""
    before, index = space.separable_channels, 0
    for channels, ops in zip(arch.channels, arch.blocks, strict=True):
        for op in ops:
            yield index, before, channels, op
            before = channels
            index += 1


def links(space: Space, block: int) -> list[tuple[int, int]]:
    """The channels before and after a block that live networks have: any pair at the first block of a cluster, the
    same number twice inside."""
    cluster = space.block_cluster[block]
    own = space.live_channels(cluster)
    if not space.is_first(block):
        return [(channels, channels) for channels in own]
    before: Iterable[int] = space.live_channels(cluster - 1) if cluster else (space.separable_channels,)
    return [(b, channels) for b in before for channels in own]


def dims_at(space: Space, index: int, before: int, channels: int, op: BlockOp) -> BlockDims:
    """The sizes of a released block."""
    return BlockDims(before, op.expansion * before, channels, op.kernel, space.block_stride(index))


def input_sizes(space: Space) -> list[int]:
    """Height of what every block reads in pixels, and behind them of what the tail reads."""
    sizes = [-(-space.resolution // space.stem_stride)]
    for i in range(space.num_blocks):
        sizes.append(-(-sizes[-1] // space.block_stride(i)))
    return sizes


class CostModel:
    """The costs of a space that are counted. Blocks are counted once and remembered."""

    macs: Cost
    """Multiply-adds for one image.

    Of convolutions and linear layers, without bias additions and batch normalisation, as the field counts ("FLOPs" in
    NAS papers means this number)."""
    params: Cost
    """Trained parameters, batch normalisation's scale and shift and the classifier's bias among them."""
    activation_bytes: Cost
    """Most bytes of activations held at once for one image, in fp32.

    While a layer runs, its input and its output are there, and inside a block with a shortcut the block's input too."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._pixels = [size**2 for size in input_sizes(space)]
        pixels, last = self._pixels[0], self._pixels[-1]
        images, stem, separable = space.input_channels, space.stem_channels, space.separable_channels
        tail, classes = space.tail_channels, space.classes
        self.macs = Cost(
            space,
            operator.add,
            pixels * (9 * images * stem + 9 * stem + stem * separable),
            cache(self._block_macs),
            lambda channels: last * channels * tail + tail * classes,
        )
        self.params = Cost(
            space,
            operator.add,
            9 * images * stem + 2 * stem + 9 * stem + 2 * stem + stem * separable + 2 * separable,
            cache(self._block_params),
            lambda channels: channels * tail + 2 * tail + tail * classes + classes,
        )
        self.activation_bytes = Cost(
            space,
            max,
            BYTES * max(images * space.resolution**2 + pixels * stem, 2 * pixels * stem, pixels * (stem + separable)),
            cache(self._block_bytes),
            lambda channels: BYTES * last * (channels + tail),
        )

    def macs_and_params(self, arch: Arch) -> tuple[int, int]:
        """(multiply-adds for one image, parameters) of the released network."""
        return int(self.macs(arch)), int(self.params(arch))

    def _block_macs(self, index: int, before: int, channels: int, op: BlockOp) -> int:
        dims = dims_at(self.space, index, before, channels, op)
        depthwise_and_project = dims.kernel**2 * dims.hidden + dims.hidden * dims.out_channels
        return self._pixels[index] * dims.in_channels * dims.hidden + self._pixels[index + 1] * depthwise_and_project

    def _block_params(self, index: int, before: int, channels: int, op: BlockOp) -> int:
        dims = dims_at(self.space, index, before, channels, op)
        weights = dims.hidden * (dims.in_channels + dims.kernel**2 + dims.out_channels)
        return weights + 4 * dims.hidden + 2 * dims.out_channels

    def _block_bytes(self, index: int, before: int, channels: int, op: BlockOp) -> int:
        dims = dims_at(self.space, index, before, channels, op)
        read, written = self._pixels[index], self._pixels[index + 1]
        kept = read * dims.in_channels if dims.residual else 0
        expand = read * (dims.in_channels + dims.hidden)
        depthwise = kept + (read + written) * dims.hidden
        project = kept + written * (dims.hidden + dims.out_channels)
        return BYTES * max(expand, depthwise, project)
