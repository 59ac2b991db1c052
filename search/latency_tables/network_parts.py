"""Released networks cut into parts: the stem, the blocks, and the tail with the classifier.

A part's latency depends on its form alone: its widths, kernel, stride and input size. Blocks inside a cluster share
forms, so Table 1 has about 400 of them. No torch.
"""

from dataclasses import dataclass

from bsnas.engine.space.cost import dims_at, input_sizes, links, places_of
from bsnas.engine.space.space import Arch, BlockOp, Space


@dataclass(frozen=True)
class Part:
    """The form of a part of a released network; `block 24-144-24 k5 s1 16x16` as text."""

    kind: str
    """`stem`, `block` or `tail`."""
    widths: tuple[int, ...]
    """Channels from input to output."""
    kernel: int
    stride: int
    size: int
    """Input H and W in pixels."""

    def __str__(self) -> str:
        return f"{self.kind} {'-'.join(map(str, self.widths))} k{self.kernel} s{self.stride} {self.size}x{self.size}"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        return self.widths[0], self.size, self.size


class PartTable:
    """Which parts the released networks of a space are made of."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._sizes = input_sizes(space)
        widths = (space.input_channels, space.stem_channels, space.separable_channels)
        self.stem = Part("stem", widths, 3, space.stem_stride, space.resolution)

    def block(self, index: int, before: int, channels: int, op: BlockOp) -> Part:
        dims = dims_at(self.space, index, before, channels, op)
        widths = (dims.in_channels, dims.hidden, dims.out_channels)
        return Part("block", widths, dims.kernel, dims.stride, self._sizes[index])

    def tail(self, channels: int) -> Part:
        return Part("tail", (channels, self.space.tail_channels, self.space.classes), 1, 1, self._sizes[-1])

    def parts(self, arch: Arch) -> tuple[Part, ...]:
        """The parts of an architecture in network order."""
        blocks = (self.block(*place) for place in places_of(self.space, arch))
        return (self.stem, *blocks, self.tail(arch.channels[-1]))

    def all_parts(self) -> list[Part]:
        """Every form that a live architecture can have, each once, in network order."""
        space, found = self.space, [self.stem]
        for i in range(space.num_blocks):
            for before, channels in links(space, i):
                found += [self.block(i, before, channels, op) for op in space.live_block_ops(i, channels)]
        found += map(self.tail, space.live_channels(len(space.clusters) - 1))
        return list(dict.fromkeys(found))
