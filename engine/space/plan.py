"""The plan of a block: its layers as data, of real sizes. No torch.

Everything that has to know what a block computes walks through its plan: costs, weights and their slices, the forward
passes of training, scoring and released networks, latency parts. A family (engine/space/families/) makes the plans.
"""

from typing import Literal, NamedTuple

Activation = Literal["relu6", "relu"]
"""After a layer's batch normalisation."""


class Conv(NamedTuple):
    """A convolution, its batch normalisation, and an activation where it has one; "same" padding."""

    name: str
    """Of its weights within the block."""
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    """Whether every channel is convolved alone; then `inputs` and `outputs` are equal."""
    activation: Activation | None = None

    @property
    def taps(self) -> int:
        """Weights of one output channel."""
        return self.kernel**2 * (1 if self.depthwise else self.inputs)

    def __str__(self) -> str:
        kind = "d" if self.depthwise else ""
        return f"{self.inputs}-{self.outputs} {kind}k{self.kernel} s{self.stride} {self.activation or 'linear'}"


Shortcut = Conv | Literal["identity", "padded"]
"""What is added to the last layer's output before its activation: the block's input through a convolution, as it is, or
with zeros for the channels that it lacks."""


class Plan(NamedTuple):
    """A block: layers one after another, and a shortcut around them."""

    layers: tuple[Conv, ...]
    """None where the block is nothing: its output is its input."""
    shortcut: Shortcut | None = None
    pool: bool = False
    """Whether a 3x3 max pool of stride 2 follows."""

    @property
    def convs(self) -> tuple[Conv, ...]:
        """All convolutions, the shortcut's last; their norms are in this order."""
        return (*self.layers, self.shortcut) if isinstance(self.shortcut, Conv) else self.layers

    @property
    def stride(self) -> int:
        """By which height and width fall, rounded up."""
        stride = 2 if self.pool else 1
        for layer in self.layers:
            stride *= layer.stride
        return stride

    @property
    def hidden(self) -> int:
        """The widest inner layer, or 0."""
        return max((layer.outputs for layer in self.layers[:-1]), default=0)

    @property
    def kernel(self) -> int:
        """The largest kernel, or 0."""
        return max((layer.kernel for layer in self.layers), default=0)

    def __str__(self) -> str:
        shortcut = self.shortcut or "none"
        return f"{', '.join(map(str, self.layers))}; shortcut {shortcut}{', max pool' if self.pool else ''}"


def size_after(size: int, stride: int) -> int:
    """Height and width after a stride, rounded up."""
    return -(-size // stride)


def layer_sizes(plan: Plan, size: int) -> list[tuple[Conv, int, int]]:
    """Every convolution with the height of what it reads and of what it writes, for a block that reads `size`."""
    found = []
    at = size
    for layer in plan.layers:
        found.append((layer, at, at := size_after(at, layer.stride)))
    if isinstance(plan.shortcut, Conv):
        found.append((plan.shortcut, size, size_after(size, plan.shortcut.stride)))
    return found
