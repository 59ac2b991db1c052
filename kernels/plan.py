"""What the operations here are told of a block, and the one order in which its layers run.

A plan is any object of these attributes; engine/space/plan.py has the project's. `run` walks through it with a function
for one layer, so training, scoring and released networks differ in what a layer does and in nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class LayerPlan(Protocol):
    """A convolution with "same" padding, its batch normalisation and activation."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def kernel(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def depthwise(self) -> bool: ...
    @property
    def activation(self) -> str | None:
        """`relu6`, `relu` or None; after the shortcut's sum where there is one."""
        ...


class BlockPlan(Protocol):
    """Layers one after another, and a shortcut around them; without layers the block is nothing."""

    @property
    def layers(self) -> Sequence[LayerPlan]: ...
    @property
    def shortcut(self) -> LayerPlan | str | None:
        """A convolution, `identity`, `padded` (zeros for missing channels) or None."""
        ...

    @property
    def pool(self) -> bool:
        """Whether a 3x3 max pool of stride 2 follows."""
        ...


Layer = Callable[[int, LayerPlan, Tensor, Tensor | None], Tensor]
"""Called with a layer's position among the block's convolutions (a shortcut's is the last), the layer, its input, and
what is added to its norm's output before the activation."""


def run(plan: BlockPlan, x: Tensor, layer: Layer) -> Tensor:
    """x [N, inputs, H, W] -> the block's output, each convolution by one call of `layer`."""
    if not plan.layers:
        return x
    shortcut, last, y = plan.shortcut, len(plan.layers) - 1, x
    residual: Tensor | None = None
    if shortcut == "identity":
        residual = x
    elif shortcut == "padded":
        residual = F.pad(x, (0, 0, 0, 0, 0, plan.layers[-1].outputs - x.shape[1]))
    elif shortcut is not None and not isinstance(shortcut, str):
        residual = layer(last + 1, shortcut, x, None)
    for index, each in enumerate(plan.layers):
        y = layer(index, each, y, residual if index == last else None)
    return F.max_pool2d(y, 3, 2, 1) if plan.pool else y


def is_matrix(layer: LayerPlan) -> bool:
    """Whether a layer is a matrix product over the pixels."""
    return layer.kernel == 1 and layer.stride == 1 and not layer.depthwise


def centre(weight: Tensor, kernel: int) -> Tensor:
    """The middle of a weight's kernels: [..., K, K] -> view [..., kernel, kernel]."""
    margin = (weight.shape[-1] - kernel) // 2
    middle = slice(margin, margin + kernel)
    return weight[..., middle, middle]


def slice_of(weight: Tensor, layer: LayerPlan) -> Tensor:
    """What a layer uses of a weight: [out, in] of a 1x1 convolution, else [out, in, k, k] with [out, 1, k, k] of a
    depthwise one; a view of the first rows and columns and the centre of the kernel.

    A weight whose largest kernel is larger than a 1x1 layer's still gives [out, in].
    """
    part = weight[: layer.outputs]
    if not layer.depthwise:
        part = part[:, : layer.inputs]
    if weight.dim() == 4:
        part = centre(part, layer.kernel)
    return part.flatten(1) if part.dim() == 4 and layer.kernel == 1 and not layer.depthwise else part


def activate(y: Tensor, activation: str | None) -> Tensor:
    """With the activation, in a tensor of its own."""
    if activation is None:
        return y
    return F.relu6(y) if activation == "relu6" else torch.relu(y)


def activate_(y: Tensor, activation: str | None) -> Tensor:
    """With the activation, in place; without gradients."""
    if activation is None:
        return y
    return y.clamp_(0, 6) if activation == "relu6" else y.clamp_(min=0)
