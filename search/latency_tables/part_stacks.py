"""Stacks of copies of one part of a network: what a latency table times.

From stacks of different heights the cost of one copy follows without the fixed cost of a call.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from bsnas.engine.networks.subnet import PlannedBlock
from bsnas.search.latency_tables.network_parts import Part


def stack(part: Part, copies: int) -> nn.Module:
    """A network of copies of a part with random weights: in a row where the shape allows it, else side by side.

    In a row is what the network has inside a cluster, shortcut included. Copies side by side read one input and
    are summed, an addition that backends fuse into the last convolution as they do with the shortcut.
    """
    layers = [_layer(part) for _ in range(copies)]
    network = nn.Sequential(*layers) if part.repeats else _SideBySide(layers)
    return unit_scale(network if part.kind == "tail" else _Pooled(network))


def _layer(part: Part) -> nn.Module:
    blocks = [PlannedBlock(plan) for plan in part.plans]
    if part.kind != "tail":
        return nn.Sequential(*blocks)
    features = part.plans[-1].layers[-1].outputs if part.plans else part.inputs
    return nn.Sequential(_Pooled(nn.Sequential(*blocks)), nn.Linear(features, part.classes))


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
