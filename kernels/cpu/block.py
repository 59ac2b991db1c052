"""The inverted residual block for training on a CPU.

Pointwise convolutions are oneDNN's matrix products. Depthwise convolutions and batch normalisation are native.cpp's:
oneDNN's gradient of depthwise weights takes half of a training step on AVX2.
Only the raw convolution outputs y1, y2, y3 are kept; backward recomputes norms, activations and masks from them. The
plain reference is `bsnas.kernels.reference.inverted_residual`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bsnas.kernels import reference
from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.compiler import opaque
from bsnas.kernels.cpu import native


class Norm(NamedTuple):
    """A BatchNorm2d taken apart: what the kernels read and move."""

    weight: Tensor
    bias: Tensor
    running: tuple[Tensor, Tensor]
    momentum: float
    eps: float

    @classmethod
    def of(cls, bn: nn.BatchNorm2d, training: bool) -> "Norm":
        """Counts the batch where `training`."""
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert bn.num_batches_tracked is not None
        momentum = bn.momentum
        if training:
            bn.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1.0 / float(bn.num_batches_tracked)
        return cls(bn.weight, bn.bias, (bn.running_mean, bn.running_var), momentum or 0.0, bn.eps)

    def stats(self, moments: native.Moments | None, pixels: int) -> native.Stats:
        """Of the batch whose moments are given, else the running ones."""
        if moments is not None:
            return native.finalize(moments, pixels, self.weight, self.bias, self.running, self.momentum, self.eps)
        mean, var = self.running
        rstd = (var + self.eps).rsqrt()
        scale = self.weight * rstd
        return torch.stack((mean, rstd, scale, self.bias - mean * scale)).detach()


def supports(norms: tuple[nn.BatchNorm2d | None, ...], kernel: int) -> bool:
    """Whether the native kernels know this block; the reference takes the others."""
    return kernel in native.KERNELS and all(
        bn is None or (bn.affine and bn.running_mean is not None and bn.num_batches_tracked is not None) for bn in norms
    )


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _count(x: Tensor, training: bool) -> int:
    """How many values of a channel the statistics came from."""
    return x.shape[0] * _pixels(x) if training else 0


def _has_shortcut(shape: BlockShape, expand: Tensor | None, norm: object) -> bool:
    """Not where x is a raw convolution output: its activation, which a shortcut would add, is never written."""
    return shape.residual and (expand is not None or norm is None)


# ---- pointwise convolution


def _matrix(x: Tensor) -> Tensor:
    """[N, C, H, W] channels_last -> its view [N * H * W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _nhwc(x: Tensor) -> Tensor:
    """Channels-last in memory. A tensor of one channel is both, and a convolution may then choose the other."""
    return x.contiguous(memory_format=torch.channels_last)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [N, K] transposed; each dense, or the transpose of a dense tensor.

    oneDNN's product in float32: 100 to 120 G multiply-adds a second on one AVX-512 core of an EPYC (Zen 5) where
    torch.mm, which is MKL's, reaches 50, and 60 against 53 with AVX2 (torch 2.14, 2026-11-25).
    """
    if a.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """1x1 convolution of x [N, in, H, W], channels_last, with weight [out, in], dense."""
    images, _, height, width = x.shape
    return _product(_matrix(x), weight).view(images, height, width, -1).permute(0, 3, 1, 2)


def pointwise_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradients of x and of weight."""
    images, channels, height, width = x.shape
    rows, row_gradients = _matrix(x), _matrix(dy)
    dx = _product(row_gradients, weight.t()).view(images, height, width, channels).permute(0, 3, 1, 2)
    if min(weight.shape) < 32:  # oneDNN splits no sum, so few sums over many rows are MKL's: 30 against 14 G a second
        return dx, torch.mm(row_gradients.t(), rows)
    if weight.shape[0] < weight.shape[1]:  # rows of the result are the shorter side: 67 against 23 G a second
        return dx, _product(row_gradients.t(), rows.t())
    return dx, _product(rows.t(), row_gradients.t()).t()


# ---- the block


class InvertedResidual(torch.autograd.Function):
    """x, the slices of expand, depthwise and project, then weight and bias of each norm carry gradients."""

    @staticmethod
    def forward(ctx, x, expand, depthwise, project, norms, shape, training, *affine):  # type: ignore[no-untyped-def]
        norm1, norm2, norm3 = norms
        y1 = x if expand is None else pointwise(x, expand)
        stats1 = None
        if norm1 is not None:
            stats1 = norm1.stats(native.image_moments(y1) if training else None, _pixels(y1))
        y2, moments = native.depthwise_forward(y1, stats1, depthwise, shape, moments=training)
        stats2 = norm2.stats(moments, _pixels(y2))
        y3 = pointwise(native.apply(y2, stats2, activation=shape.activation), project)
        stats3 = norm3.stats(native.image_moments(y3) if training else None, _pixels(y3))
        shortcut = _has_shortcut(shape, expand, norm1)
        ctx.save_for_backward(x, expand, depthwise, project, y1, y2, y3, stats1, stats2, stats3)
        ctx.static = shape, training, shortcut
        return native.apply(y3, stats3, shortcut=x if shortcut else None)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, expand, depthwise, project, y1, y2, y3, stats1, stats2, stats3 = ctx.saved_tensors
        shape, training, shortcut = ctx.static
        grad = _nhwc(grad)

        sums = native.gradient_sums(grad, y3, stats3, activation=None)
        coefficients, *affine3 = native.finalize_backward(sums, stats3, _count(y3, training))
        dy3 = native.apply_backward(grad, y3, stats3, coefficients, activation=None)
        dz2, d_project = pointwise_backward(dy3, native.apply(y2, stats2, activation=shape.activation), project)

        sums = native.gradient_sums(dz2, y2, stats2, activation=shape.activation)
        coefficients, *affine2 = native.finalize_backward(sums, stats2, _count(y2, training))
        dx, d_depthwise, sums = native.depthwise_backward(dz2, y2, stats2, coefficients, y1, stats1, depthwise, shape)

        affine1: list[Tensor | None] = [None, None]
        if stats1 is not None:
            coefficients, *affine1 = native.finalize_backward(sums, stats1, _count(y1, training))
            # The depthwise kernel has let the gradient through the activation already.
            dx = native.apply_backward(dx, y1, stats1, coefficients, activation=None)
        d_expand = None
        if expand is not None:
            dx, d_expand = pointwise_backward(dx, x, expand)
        if shortcut:
            dx = dx.add_(grad)
        return dx, d_expand, d_depthwise, d_project, None, None, None, *affine1, *affine2, *affine3


@opaque
def inverted_residual(
    x: Tensor,
    weights: BlockWeights,
    norms: tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d],
    shape: BlockShape,
    *,
    training: bool,
) -> Tensor:
    """See `kernels.inverted_residual`."""
    if not supports(norms, shape.kernel):
        return reference.inverted_residual(x, weights, norms, shape, training=training)
    check_rows(training, x.shape[0] * -(-x.shape[2] // shape.stride) * -(-x.shape[3] // shape.stride))
    taken = tuple(None if bn is None else Norm.of(bn, training) for bn in norms)
    return InvertedResidual.apply(  # type: ignore[no-any-return]
        _nhwc(x),
        None if weights.expand is None else weights.expand[: shape.hidden, : shape.in_channels].contiguous(),
        reference.centre_crop(weights.depthwise, shape.hidden, shape.kernel).contiguous(),
        weights.project[: shape.out_channels, : shape.hidden].contiguous(),
        taken, shape, training,
        *(tensor for norm in taken for tensor in ((None, None) if norm is None else (norm.weight, norm.bias))),
    )  # fmt: skip


def check_rows(training: bool, rows: int) -> None:
    if training and rows < 2:
        raise ValueError("batch statistics need more than one value per channel; got one; enlarge the batch or image")


# ---- the tail: pointwise convolution, BN, activation


class PointwiseBnAct(torch.autograd.Function):
    """x, the weight's slice, and the norm's weight and bias carry gradients."""

    @staticmethod
    def forward(ctx, x, weight, norm, activation, training, *affine):  # type: ignore[no-untyped-def]
        y = pointwise(x, weight)
        stats = norm.stats(native.image_moments(y) if training else None, _pixels(y))
        ctx.save_for_backward(x, weight, y, stats)
        ctx.static = activation, training
        return native.apply(y, stats, activation=activation)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, weight, y, stats = ctx.saved_tensors
        grad = _nhwc(grad)
        activation, training = ctx.static
        sums = native.gradient_sums(grad, y, stats, activation=activation)
        coefficients, d_gamma, d_beta = native.finalize_backward(sums, stats, _count(y, training))
        dy = native.apply_backward(grad, y, stats, coefficients, activation=activation)
        dx, d_weight = pointwise_backward(dy, x, weight)
        return dx, d_weight, None, None, None, d_gamma, d_beta


@opaque
def pointwise_bn_act(
    x: Tensor, weight: Tensor, bn: nn.BatchNorm2d, *, in_channels: int, activation: str, training: bool
) -> Tensor:
    """See `kernels.pointwise_bn_act`."""
    if not supports((bn,), native.KERNELS[0]):
        return reference.pointwise_bn_act(
            x, weight, bn, in_channels=in_channels, activation=activation, training=training
        )
    check_rows(training, x.shape[0] * _pixels(x))
    norm = Norm.of(bn, training)
    x = _nhwc(x)
    weight = weight[:, :in_channels].contiguous()
    return PointwiseBnAct.apply(x, weight, norm, activation, training, norm.weight, norm.bias)  # type: ignore[no-any-return]
