"""Folded convolutions on a CPU: oneDNN convolutions with a fused tail, and matrix products where these are faster.

Measured on one core of an EPYC (AVX2, torch 2.14, 2026-11-24), 64 images, G multiply-adds a second, where a 1024x1024
product reaches 46: expand 192 -> 1152 at 2x2: convolution 31, packed 35, product with clamp 45; expand 48 -> 288 at
8x8: 37, 41, 40; project 288 -> 48 at 8x8: 42, 44, 40; project 1152 -> 192 at 2x2: 39, 43, 46.
"""

from typing import Any

import torch
from torch import Tensor

RELU6: tuple[str, list[float], str] = ("hardtanh", [0.0, 6.0], "")
IDENTITY: tuple[str, list[float], str] = ("none", [], "")


def _product_is_faster(out_channels: int, in_channels: int, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and in_channels >= 64 and out_channels >= 96


class OneDNN:
    """Backend `onednn` of kernels.inference.

    A segment's scale goes into its own copy of the weights. Scaling them costs in * out multiplications against
    n * H * W times as many in the convolution, while a pass over the output would cost memory traffic.
    """

    @staticmethod
    def packed_pointwise(weight: Tensor, size: int) -> Tensor:
        """[out, in] as oneDNN's opaque layout, or as the transpose of a contiguous [in, out]."""
        out_channels, in_channels = weight.shape
        if _product_is_faster(out_channels, in_channels, weight.dtype):
            return weight.t().contiguous().t()
        return _packed(weight[:, :, None, None], [0, 0], 1, 1, [16, in_channels, size, size])

    @staticmethod
    def packed_depthwise(weight: Tensor, size: int, stride: int) -> Tensor:
        channels, _, kernel, _ = weight.shape
        return _packed(weight, [kernel // 2] * 2, stride, channels, [16, channels, size, size])

    @staticmethod
    def folded_pointwise(
        x: Tensor, weight: Tensor, bias: Tensor, *, relu6: bool, residual: Tensor | None = None
    ) -> Tensor:
        out_channels, in_channels = weight.shape[:2]
        if _product_is_faster(out_channels, in_channels, x.dtype):
            return _product(x, weight, bias, relu6=relu6, residual=residual)
        w = weight if weight.is_mkldnn else weight[:, :, None, None]
        if residual is None:
            tail = RELU6 if relu6 else IDENTITY
            return torch.ops.mkldnn._convolution_pointwise(x, w, bias, [0, 0], [1, 1], [1, 1], 1, *tail)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, w, bias, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, None, [], None
        )

    @staticmethod
    def folded_depthwise(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, relu6: bool) -> Tensor:
        margin = [weight.shape[-1] // 2] * 2
        tail = RELU6 if relu6 else IDENTITY
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, margin, [stride, stride], [1, 1], weight.shape[0], *tail
        )

    @staticmethod
    def segmented_pointwise(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, relu6: bool, residual: Tensor | None = None
    ) -> Tensor:
        residuals = [None] * len(scale) if residual is None else residual.chunk(len(scale))
        return _cat(
            [
                OneDNN.folded_pointwise(
                    part, (weight * s[:, None]).to(x.dtype), b.to(x.dtype), relu6=relu6, residual=shortcut
                )
                for part, s, b, shortcut in zip(x.chunk(len(scale)), scale, shift, residuals, strict=True)
            ]
        )

    @staticmethod
    def segmented_depthwise(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, relu6: bool
    ) -> Tensor:
        return _cat(
            [
                OneDNN.folded_depthwise(
                    part, (weight * s[:, None, None, None]).to(x.dtype), b.to(x.dtype), stride=stride, relu6=relu6
                )
                for part, s, b in zip(x.chunk(len(scale)), scale, shift, strict=True)
            ]
        )


def _packed(weight: Tensor, margin: list[int], stride: int, groups: int, input_size: list[int]) -> Any:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), margin, [stride, stride], [1, 1], groups, input_size
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor, *, relu6: bool, residual: Tensor | None) -> Tensor:
    """The 1x1 convolution as rows [N * H * W, in] times weight transposed."""
    images, in_channels, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, in_channels)
    if residual is None:
        y = torch.addmm(bias, rows, weight.t())
    else:
        y = (residual.permute(0, 2, 3, 1).reshape(-1, len(bias)) + bias).addmm_(rows, weight.t())
    if relu6:
        y.clamp_(0, 6)
    return y.view(images, height, width, -1).permute(0, 3, 1, 2)


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
