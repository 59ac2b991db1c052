"""Convolutions of networks that do not train: batch normalisation folded in, activation and shortcut fused.

Two families, equal in meaning on every backend:

- `folded_*` take weights that already contain the batch normalisation, and a bias.
- `segmented_*` take raw weights and a scale and shift *per segment*: the batch [M, ...] consists of S equal segments,
  each from another network that uses the same weights with its own batch normalisation. `folded_*` is the case S = 1.

Backends: `reference` (plain torch, any device) is the specification; `onednn` (CPU) and `triton` (NVIDIA GPU) run the
convolution with its tail as one kernel. They are chosen as in training (`kernels/backends.py`).
Activations are [N, C, H, W] in channels_last; convolutions keep the size at
stride 1 ("same" padding, odd kernels).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bsnas.kernels.backends import choose_backend
from bsnas.kernels.cpu.inference import OneDNN
from bsnas.kernels.plan import LayerPlan, activate_, is_matrix


def fold_norm(norm: torch.nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The (scale, shift), both [C] in float32, that a batch normalisation applies in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return scale_and_shift(norm, norm.running_mean, norm.running_var)


def scale_and_shift(norm: torch.nn.BatchNorm2d, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """The (scale, shift) of a batch normalisation with other statistics; mean, var [..., C] give [..., C], float32."""
    scale = norm.weight.detach().float() * torch.rsqrt(var.float() + norm.eps)
    return scale, norm.bias.detach().float() - mean.float() * scale


def folded_pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str | None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1x1 convolution: x [N, in, H, W], weight [out, in], bias [out] -> [N, out, H, W].

    The result passes the activation (relu6 or relu), or `residual` [N, out, H, W] is added to it; not both.
    """
    assert activation is None or residual is None, "a block has no activation after its shortcut"
    return _backend(backend, x).folded_pointwise(x, weight, bias, activation=activation, residual=residual)


def folded_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, activation: str | None, backend: str | None = None
) -> Tensor:
    """Depthwise convolution: x [N, C, H, W], weight [C, 1, k, k], bias [C] -> [N, C, ceil(H / stride), ...]."""
    return _backend(backend, x).folded_depthwise(x, weight, bias, stride=stride, activation=activation)


def packed_depthwise(weight: Tensor, size: int, stride: int) -> Tensor:
    """A weight [C, 1, k, k] of `folded_depthwise` in the layout that runs fastest where the weight is.

    `size` is the height and width of the inputs to come. The result is only good for `folded_depthwise`, on the
    backend that is in force now.
    """
    backend = _backend(None, weight)
    return weight if backend is Reference else backend.packed_depthwise(weight, size, stride)


def segmented_pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    activation: str | None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """1x1 convolution, then scale and shift of each segment: x [S * n, in, H, W], scale, shift [S, out], float32."""
    assert activation is None or residual is None, "a block has no activation after its shortcut"
    return _backend(backend, x).segmented_pointwise(x, weight, scale, shift, activation=activation, residual=residual)


def segmented_depthwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int,
    activation: str | None,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution, then scale and shift of each segment: x [S * n, C, H, W], scale, shift [S, C]."""
    return _backend(backend, x).segmented_depthwise(x, weight, scale, shift, stride=stride, activation=activation)


def segment_statistics(y: Tensor, segments: int) -> tuple[Tensor, Tensor]:
    """Batch statistics of each segment: y [S * n, C, H, W] -> mean and biased variance, both [S, C] in float32."""
    if y.device.type == "cpu" and y.dtype == torch.float32:
        # 5 to 28 times as fast as var_mean over the rows, which does not vectorise over channels (EPYC, torch 2.14).
        each = [torch.batch_norm_update_stats(part, None, None, 0.0) for part in y.chunk(segments)]
        return torch.stack([mean for mean, _ in each]), torch.stack([var for _, var in each])
    rows = y.permute(0, 2, 3, 1).reshape(segments, -1, y.shape[1]).float()
    var, mean = torch.var_mean(rows, dim=1, correction=0)
    return mean, var


def segment_affine_(
    y: Tensor, scale: Tensor, shift: Tensor, *, activation: str | None, residual: Tensor | None = None
) -> Tensor:
    """Scale and shift of each segment, in place where y is float32: y [S * n, C, H, W] with scale, shift [S, C]."""
    segments = y.unflatten(0, (scale.shape[0], -1))
    spread = (slice(None), None, slice(None), None, None)
    if y.dtype == torch.float32:
        torch.addcmul(shift[spread], segments, scale[spread], out=segments)
    else:
        y = torch.addcmul(shift[spread], segments, scale[spread]).to(y.dtype).flatten(0, 1)
    if residual is not None:
        y += residual
    return activate_(y, activation)


# ---- a layer of any plan


def convolution(layer: LayerPlan, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's convolution of x [N, inputs, H, W] alone; weight as `slice_of` gives it."""
    if is_matrix(layer):
        return folded_pointwise(x, weight, x.new_zeros(len(weight)), activation=None)
    if layer.depthwise:
        return folded_depthwise(x, weight, x.new_zeros(len(weight)), stride=layer.stride, activation=None)
    return _dense(layer, x, weight, None)


def folded(layer: LayerPlan, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """A layer with its norm folded in: convolution, bias [out], + residual, activation."""
    fused = layer.activation if residual is None else None
    if is_matrix(layer):
        y, residual = folded_pointwise(x, weight, bias, activation=fused, residual=residual), None
    elif layer.depthwise:
        y = folded_depthwise(x, weight, bias, stride=layer.stride, activation=fused)
    else:
        y, fused = _dense(layer, x, weight, bias), None
    if residual is not None:
        y = y + residual
    return y if fused else activate_(y, layer.activation)


def segmented(
    layer: LayerPlan, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> Tensor:
    """A layer with a norm of each segment: x [S * n, inputs, H, W], scale, shift [S, out], float32."""
    fused = layer.activation if residual is None else None
    if is_matrix(layer):
        y = segmented_pointwise(x, weight, scale, shift, activation=fused, residual=residual)
        return y if fused else activate_(y, layer.activation)
    if layer.depthwise and residual is None:
        y = segmented_depthwise(x, weight, scale, shift, stride=layer.stride, activation=fused)
        return y if fused else activate_(y, layer.activation)
    y = convolution(layer, x, weight)
    return segment_affine_(y, scale, shift, activation=layer.activation, residual=residual)


def _dense(layer: LayerPlan, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    return F.conv2d(x, weight, bias, stride=layer.stride, padding=layer.kernel // 2)


class Reference:
    """The specification, in plain torch, on any device."""

    @staticmethod
    def folded_pointwise(
        x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None, residual: Tensor | None = None
    ) -> Tensor:
        y = F.conv2d(x, weight[:, :, None, None], bias)
        if residual is not None:
            y = y + residual
        return activate_(y, activation)

    @staticmethod
    def folded_depthwise(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, activation: str | None) -> Tensor:
        y = F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return activate_(y, activation)

    @staticmethod
    def segmented_pointwise(
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        *,
        activation: str | None,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = F.conv2d(x, weight[:, :, None, None])
        return segment_affine_(y, scale, shift, activation=activation, residual=residual)

    @staticmethod
    def segmented_depthwise(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, activation: str | None
    ) -> Tensor:
        y = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return segment_affine_(y, scale, shift, activation=activation)


def _backend(name: str | None, x: Tensor) -> Any:
    name = choose_backend(x, name, "score")
    if name == "triton":
        from bsnas.kernels.gpu.inference import Triton

        return Triton
    return OneDNN if name == "onednn" else Reference
