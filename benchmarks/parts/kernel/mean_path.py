"""What the kernel benchmarks run: the mean path through the paper's Table 1, and all block shapes of that table.

Here as data, so that counting and tuning need torch and Triton only. The mean path takes the middle channel option of
every cluster (the largest where the supernet fixes a spring block's width), kernels 3, 5, 7 and expansions 6, 3 in
turn.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.kernels import BlockShape, BlockWeights, inverted_residual, pointwise_bn_act

# blocks, channel options, stride of the first block
CLUSTERS = (
    (2, (24, 32, 40), 2),
    (4, (40, 48, 56), 2),
    (4, (64, 72, 80), 2),
    (4, (96, 112, 128), 1),
    (4, (160, 192, 224), 2),
    (1, (240, 280, 320), 1),
)
STEM, SEPARABLE, TAIL = 32, 16, 1280


class PlacedBlock(NamedTuple):
    shape: BlockShape
    size: int
    """Height and width of the input map."""


def mean_path(resolution: int = 224) -> list[PlacedBlock]:
    blocks: list[PlacedBlock] = []
    size, inputs = resolution // 2, SEPARABLE
    for count, options, stride in CLUSTERS:
        for position in range(count):
            spring = position == count - 1 and count > 1
            outputs = options[-1] if spring else options[len(options) // 2]
            kernel, expansion = (3, 5, 7)[len(blocks) % 3], (6, 3)[len(blocks) % 2]
            first = stride if position == 0 else 1
            blocks.append(PlacedBlock(BlockShape(inputs, inputs * expansion, outputs, kernel, first), size))
            size, inputs = -(-size // first), outputs
    return blocks


def table_shapes(resolution: int = 224) -> Iterator[PlacedBlock]:
    """Every block shape of the supernet, kernel 3 only (kernels change the depthwise convolution alone)."""
    size, fixed_in = resolution // 2, SEPARABLE
    seen = set()
    for count, options, stride in CLUSTERS:
        for position in range(count):
            first = stride if position == 0 else 1
            for c in options:
                inputs = fixed_in if position == 0 else c
                outputs = options[-1] if position == count - 1 and count > 1 else c
                for expansion in (3, 6):
                    block = PlacedBlock(BlockShape(inputs, inputs * expansion, outputs, 3, first), size)
                    if block not in seen:
                        seen.add(block)
                        yield block
            size = -(-size // first)
        fixed_in = options[-1]


class PathNetwork(nn.Module):
    """One path of the supernet with weights of exactly its size; its blocks run on the backend in force."""

    def __init__(self, resolution: int = 224, classes: int = 1000) -> None:
        super().__init__()
        self.placed = mean_path(resolution)
        self.stem = nn.Conv2d(3, STEM, 3, stride=2, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(STEM)
        shapes = [BlockShape(STEM, STEM, SEPARABLE, 3, 1), *(block.shape for block in self.placed)]
        self.shapes = shapes
        self.weights = nn.ParameterList()
        self.norms = nn.ModuleList()
        for shape in shapes:
            self.weights.append(nn.Parameter(torch.randn(shape.hidden, shape.in_channels) * (2 / shape.hidden) ** 0.5))
            self.weights.append(
                nn.Parameter(torch.randn(shape.hidden, 1, shape.kernel, shape.kernel) * 1.4 / shape.kernel)
            )
            self.weights.append(nn.Parameter(torch.randn(shape.out_channels, shape.hidden) * (2 / shape.hidden) ** 0.5))
            widths = (shape.hidden, shape.hidden, shape.out_channels)
            self.norms.append(nn.ModuleList([nn.BatchNorm2d(c) for c in widths]))
        self.weights[0].requires_grad_(False)  # the separable block has no expansion
        self.tail = nn.Parameter(torch.randn(TAIL, shapes[-1].out_channels) * 0.05)
        self.tail_bn = nn.BatchNorm2d(TAIL)
        self.classifier = nn.Linear(TAIL, classes)

    def block(self, i: int, x: Tensor) -> Tensor:
        """Block i; 0 is the stem's separable convolution, which takes the stem's raw convolution output."""
        expand, depthwise, project = self.weights[3 * i : 3 * i + 3]
        norms: tuple[nn.Module, ...] = tuple(self.norms[i])  # type: ignore[arg-type]
        if i == 0:
            norms = (self.stem_bn, *norms[1:])
        weights = BlockWeights(None if i == 0 else expand, depthwise, project)
        return inverted_residual(x, weights, norms, self.shapes[i], training=self.training)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(len(self.shapes)):
            x = self.block(i, x)
        x = pointwise_bn_act(
            x, self.tail, self.tail_bn, in_channels=self.shapes[-1].out_channels, training=self.training
        )
        return F.linear(x.mean((2, 3)), self.classifier.weight, self.classifier.bias)
