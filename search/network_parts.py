"""Released networks cut into parts: the stem, the blocks, and the tail with the classifier.

A part's latency depends on its form alone: its widths, kernel, stride and input size. Blocks inside a cluster share
forms, so Table 1 has about 400 of them. A form is timed as a stack of several copies, from whose number the cost of one
copy follows without the fixed cost of a call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from engine.space import Arch, BlockDims, Space
from engine.subnet import InvertedResidual, Subnet
from search.chain import links


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

    def stack(self, part: Part, copies: int) -> nn.Module:
        """A network of copies of a part with random weights: in a row where the shape allows it, else side by side.

        In a row is what the network has inside a cluster, shortcut included. Copies side by side read one input and
        are summed, an addition that backends fuse into the last convolution as they do with the shortcut.
        """
        layers = [self._layer(part) for _ in range(copies)]
        in_a_row = part.kind == "block" and part.stride == 1 and part.widths[0] == part.widths[-1]
        network = nn.Sequential(*layers) if in_a_row else _SideBySide(layers)
        return unit_scale(network if part.kind == "tail" else _Pooled(network))

    def _layer(self, part: Part) -> nn.Module:
        if part.kind == "block":
            inputs, hidden, outputs = part.widths
            return InvertedResidual(BlockDims(inputs, hidden, outputs, part.kernel, part.stride))
        channels = [self.space.live_channels(j)[0] for j in range(len(self.space.clusters))]
        if part.kind == "tail":
            channels[-1] = part.widths[0]
        ops = [
            tuple(self.space.live_block_ops(i, c)[0] for i in blocks)
            for c, blocks in zip(channels, self.space.cluster_blocks, strict=True)
        ]
        network = Subnet(self.space, Arch(tuple(channels), tuple(ops)))
        if part.kind == "stem":
            return nn.Sequential(network.stem, network.separable)
        return nn.Sequential(_Pooled(network.tail), network.classifier)


def unit_scale(network: nn.Module) -> nn.Module:
    """The network, its weights drawn so that activations stay near 1: vanishing ones are timed as slow subnormals."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return network.eval()


class _SideBySide(nn.Module):
    """The sum of the answers of several networks to one input."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        total = self.layers[0](x)
        for layer in self.layers[1:]:
            total = total + layer(x)
        return total


class _Pooled(nn.Module):
    """A network and the mean over H and W of what it puts out: [N, C]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).mean((2, 3))
