"""Released networks cut into parts: the stem, the blocks, and the tail with the classifier.

A part's latency depends on its form alone: its widths, kernel, stride and input size. Blocks inside a cluster share
forms, so Table 1 has about 400 of them. No torch.
"""

from dataclasses import dataclass

from bsnas.engine.space.space import Arch, BlockDims, Space
from bsnas.search.costs.chain import links


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
        size = -(-space.resolution // space.stem_stride)
        self._sizes = []
        for i in range(space.num_blocks):
            self._sizes.append(size)
            size = -(-size // space.block_stride(i))
        self._final_size = size
        stem = (space.input_channels, space.stem_channels, space.separable_channels)
        self._stem = Part("stem", stem, 3, space.stem_stride, space.resolution)

    def parts(self, arch: Arch) -> tuple[Part, ...]:
        """The parts of an architecture in network order."""
        dims = self.space.released_dims(arch)
        blocks = (self._block(i, d) for i, d in enumerate(dims))
        return (self._stem, *blocks, self._tail(dims[-1].out_channels))

    def all_parts(self) -> list[Part]:
        """Every form that a live architecture can have, each once, in network order."""
        space = self.space
        found = [self._stem]
        for i in range(space.num_blocks):
            for before, channels in links(space, i):
                inputs = space.separable_channels if before is None else before
                for op in space.live_block_ops(i, channels):
                    dims = BlockDims(inputs, op.expansion * inputs, channels, op.kernel, space.block_stride(i))
                    found.append(self._block(i, dims))
        found += map(self._tail, space.live_channels(len(space.clusters) - 1))
        return list(dict.fromkeys(found))

    def _block(self, index: int, dims: BlockDims) -> Part:
        widths = (dims.in_channels, dims.hidden, dims.out_channels)
        return Part("block", widths, dims.kernel, dims.stride, self._sizes[index])

    def _tail(self, channels: int) -> Part:
        return Part("tail", (channels, self.space.tail_channels, self.space.classes), 1, 1, self._final_size)
