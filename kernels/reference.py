"""Plain torch reference: the specification of every other backend. Any dtype, any device, gradients by autograd."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.plan import BlockPlan, LayerPlan, activate, centre, run, slice_of


def compute_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype where autocast is on for x's device, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def batch_norm(x: Tensor, bn: nn.BatchNorm2d, training: bool) -> Tensor:
    """`bn(x)` with `bn.training` replaced by `training`: the same values and the same updates of running statistics."""
    momentum = bn.momentum
    if training and bn.track_running_stats:
        cast(Tensor, bn.num_batches_tracked).add_(1)
        if momentum is None:  # a cumulative average
            momentum = 1.0 / float(cast(Tensor, bn.num_batches_tracked))
    return F.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias,
        training or bn.running_mean is None, momentum or 0.0, bn.eps,
    )  # fmt: skip


def centre_crop(weight: Tensor, channels: int, kernel: int) -> Tensor:
    """Depthwise weight [C_max, 1, K_max, K_max] -> view [channels, 1, kernel, kernel]."""
    return centre(weight[:channels], kernel)


def pointwise(x: Tensor, weight: Tensor, out_channels: int) -> Tensor:
    """1x1 convolution of x [N, C, H, W] with the slice `weight[:out_channels, :C]` in x's dtype."""
    return F.conv2d(x, weight[:out_channels, : x.shape[1], None, None].to(x.dtype))


def depthwise(x: Tensor, weight: Tensor, kernel: int, stride: int) -> Tensor:
    """Depthwise convolution of x [N, C, H, W] with the centre crop of `weight`, in x's dtype."""
    channels = x.shape[1]
    crop = centre_crop(weight, channels, kernel).to(x.dtype)
    return F.conv2d(x, crop, stride=stride, padding=kernel // 2, groups=channels)


def inverted_residual(
    x: Tensor,
    weights: BlockWeights,
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d],
    shape: BlockShape,
    *,
    training: bool,
) -> Tensor:
    """See `kernels.inverted_residual`."""
    x = x.to(compute_dtype(x))
    hidden = x if weights.expand is None else pointwise(x, weights.expand, shape.hidden)
    if norms[0] is not None:
        hidden = activate(batch_norm(hidden, norms[0], training), shape.activation)
    hidden = depthwise(hidden, weights.depthwise, shape.kernel, shape.stride)
    hidden = activate(batch_norm(hidden, norms[1], training), shape.activation)
    out = batch_norm(pointwise(hidden, weights.project, shape.out_channels), norms[2], training)
    raw_input = weights.expand is None and norms[0] is not None
    return x + out if shape.residual and not raw_input else out


def pointwise_bn_act(
    x: Tensor, weight: Tensor, bn: nn.BatchNorm2d, *, in_channels: int, activation: str, training: bool
) -> Tensor:
    """See `kernels.pointwise_bn_act`."""
    x = x[:, :in_channels].to(compute_dtype(x))
    return activate(batch_norm(pointwise(x, weight, weight.shape[0]), bn, training), activation)


def convolve(x: Tensor, weight: Tensor, layer: LayerPlan) -> Tensor:
    """The layer's convolution of x [N, inputs, H, W] with its slice of a weight, in x's dtype; no norm."""
    part = slice_of(weight, layer).to(x.dtype)
    part = part[:, :, None, None] if part.dim() == 2 else part
    groups, stride = layer.inputs if layer.depthwise else 1, layer.stride
    if layer.kernel == 1:
        # The same pixels. oneDNN's gradient of 1x1 weights with a stride writes where it must not on AVX-512, in
        # channels_last and with several threads (torch 2.14): processes died of it.
        x, stride = x[:, :, ::stride, ::stride], 1
    return F.conv2d(x, part, stride=stride, padding=layer.kernel // 2, groups=groups)


def run_plan(
    x: Tensor, plan: BlockPlan, weights: Mapping[str, Tensor], norms: Sequence[nn.BatchNorm2d], *, training: bool
) -> Tensor:
    """A block of any plan: weights by the names of its layers, norms in the order of its convolutions."""

    def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
        y = batch_norm(convolve(y, weights[each.name], each), norms[index], training)
        return activate(y if residual is None else residual + y, each.activation)

    return run(plan, x.to(compute_dtype(x)), layer)
