"""What every implementation of an inverted residual block is given: the slice it computes, and the weights."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockShape:
    """The slice of a block's weights that one operation uses."""

    in_channels: int
    hidden: int
    """Width between the pointwise convolutions."""
    out_channels: int
    kernel: int
    """Depthwise kernel size, odd; the padding is kernel // 2."""
    stride: int
    activation: str = "relu6"
    """After every norm but the last: relu6 or relu."""

    @classmethod
    def of(cls, dims: list[int], activation: str) -> "BlockShape":
        """From `dims` and the activation."""
        in_channels, hidden, out_channels, kernel, stride = dims
        return cls(in_channels, hidden, out_channels, kernel, stride, activation)

    @property
    def dims(self) -> list[int]:
        """The numbers alone."""
        return [self.in_channels, self.hidden, self.out_channels, self.kernel, self.stride]

    @property
    def residual(self) -> bool:
        """Whether the identity shortcut exists."""
        return self.stride == 1 and self.in_channels == self.out_channels


class BlockWeights(NamedTuple):
    """Full-size convolution weights, float32. An operation uses `W[:out, :in]` and the centre crop of the kernel."""

    expand: Tensor | None
    """[hidden_max, in_max], or None where the block has no expansion (then hidden == in_channels)."""
    depthwise: Tensor
    """[hidden_max, 1, K_max, K_max]"""
    project: Tensor
    """[out_max, hidden_max]"""


def check_slice(weights: BlockWeights, shape: BlockShape, in_channels: int) -> None:
    """Raise ValueError unless `shape` is a slice of `weights` and fits an input of `in_channels` channels."""
    k_max = weights.depthwise.shape[-1]
    largest = (weights.depthwise.shape[0], weights.project.shape[0], weights.project.shape[1])
    fits = (
        shape.in_channels == in_channels
        and shape.hidden <= min(largest[0], largest[2])
        and shape.out_channels <= largest[1]
        and shape.kernel <= k_max
        and (k_max - shape.kernel) % 2 == 0
        and shape.stride in (1, 2)
    )
    if weights.expand is None:
        fits = fits and shape.hidden == shape.in_channels
    else:
        hidden_max, in_max = weights.expand.shape
        fits = fits and shape.hidden <= hidden_max and shape.in_channels <= in_max
    if not fits:
        sizes = {name: None if w is None else tuple(w.shape) for name, w in weights._asdict().items()}
        raise ValueError(
            f"{shape} is no slice of weights {sizes} for an input of {in_channels} channels; allowed are widths up to "
            "the weights', an odd kernel up to theirs and stride 1 or 2; pass the shape that matches the operation"
        )
