"""What a family of blocks is: its options, and the plan of a block of given sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bsnas.engine.space.plan import Activation, Conv, Plan, Shortcut


class Block(NamedTuple):
    """What a family makes a plan of: the choice of a block, its row's settings, and its sizes."""

    inputs: int
    """Channels that the block reads."""
    outputs: int
    """Channels that it writes; more than `channels` in a fixed spring block."""
    channels: int
    """The selected channel number of its cluster."""
    base: int
    """What an expansion ratio of the input multiplies: `inputs`, or the widest input that there can be."""
    stride: int
    kernel: int
    expansion: int
    """0 where the hidden width is absolute or the family has none."""
    width: int
    """The absolute hidden width, or 0."""
    activation: Activation
    expand: bool = True
    projection: bool = True
    """Whether a shortcut whose sizes change is a 1x1 convolution; else there is none."""
    pool: bool = False

    @property
    def keeps_size(self) -> bool:
        """Whether input and output have the same shape."""
        return self.stride == 1 and self.inputs == self.outputs

    @property
    def fixed_spring(self) -> bool:
        """Whether it only has more outputs than inputs because its supernet's spring block has a fixed width."""
        return self.stride == 1 and self.inputs == self.channels < self.outputs


@dataclass(frozen=True)
class Family:
    """One kind of block."""

    name: str
    about: str
    """One line for `search/space.py` and error messages."""
    plan: Callable[[Block], Plan]
    hidden: bool
    """Whether its blocks have a hidden width to choose."""
    settings: frozenset[str] = frozenset()
    """Which of `expand`, `shortcut` and `pool` a row of it may set."""
    fixed_text: bool = False
    """Whether a leading or trailing cluster of it with a single option is left out of an architecture's text."""


def residual(block: Block) -> Shortcut | None:
    """ResNet's shortcut (arXiv 1512.03385, section 3.3, option B): plain where sizes agree, else a projection.

    A fixed spring block adds its input to its first channels, so that its release is the plain shortcut.
    """
    if block.keeps_size:
        return "identity"
    if block.fixed_spring:
        return "padded"
    return Conv("shortcut", block.inputs, block.outputs, 1, block.stride) if block.projection else None


def identity(block: Block) -> Plan:
    """The choice `i` of any family: nothing where sizes agree, else a 1x1 convolution with its norm (NAS-Bench-Macro,
    arXiv 2103.11922)."""
    if block.keeps_size:
        return Plan(())
    return Plan(
        (Conv("identity", block.inputs, block.outputs, 1, block.stride),), "padded" if block.fixed_spring else None
    )
