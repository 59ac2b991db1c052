"""Stacks of copies of one part of a network: what a latency table times.

From stacks of different heights the cost of one copy follows without the fixed cost of a call.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from bsnas.engine.networks.subnet import InvertedResidual, Subnet
from bsnas.engine.space.space import Arch, BlockDims, Space
from bsnas.search.latency_tables.network_parts import Part


def stack(space: Space, part: Part, copies: int) -> nn.Module:
    """A network of copies of a part with random weights: in a row where the shape allows it, else side by side.

    In a row is what the network has inside a cluster, shortcut included. Copies side by side read one input and
    are summed, an addition that backends fuse into the last convolution as they do with the shortcut.
    """
    layers = [_layer(space, part) for _ in range(copies)]
    in_a_row = part.kind == "block" and part.stride == 1 and part.widths[0] == part.widths[-1]
    network = nn.Sequential(*layers) if in_a_row else _SideBySide(layers)
    return unit_scale(network if part.kind == "tail" else _Pooled(network))


def _layer(space: Space, part: Part) -> nn.Module:
    if part.kind == "block":
        inputs, hidden, outputs = part.widths
        return InvertedResidual(BlockDims(inputs, hidden, outputs, part.kernel, part.stride))
    channels = [space.live_channels(j)[0] for j in range(len(space.clusters))]
    if part.kind == "tail":
        channels[-1] = part.widths[0]
    ops = [
        tuple(space.live_block_ops(i, c)[0] for i in blocks)
        for c, blocks in zip(channels, space.cluster_blocks, strict=True)
    ]
    network = Subnet(space, Arch(tuple(channels), tuple(ops)))
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
