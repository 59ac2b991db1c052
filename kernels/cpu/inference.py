"""Folded convolutions on a CPU: oneDNN convolutions and matrix products with a fused tail.

G multiply-adds a second on one core of an EPYC (Zen 5, AVX-512; in brackets as with AVX2; torch 2.14, 2026-11-25), 64
images, with ReLU6: expand 48 -> 288 at 8x8: torch.addmm 47 (48), packed convolution 111 (60), oneDNN's product 110
(59); project 288 -> 48: 49, 119, 118; expand 192 -> 1152 at 2x2: 54, 99, 119 (54, 54, 60); project 1152 -> 192: 54,
111, 122 (53, 55, 60).
"""

import torch
from torch import Tensor

TAILS: dict[str | None, tuple[str, list[float], str]] = {
    "relu6": ("hardtanh", [0.0, 6.0], ""), "relu": ("relu", [], ""), None: ("none", [], "")
}  # fmt: skip
"""oneDNN's name of each activation, what it is told, and how."""


class OneDNN:
    """Backend `onednn` of bsnas.kernels.inference.

    A segment's scale goes into its own copy of the weights. Scaling them costs in * out multiplications against
    n * H * W times as many in the convolution, while a pass over the output would cost memory traffic.
    """

    @staticmethod
    def packed_depthwise(weight: Tensor, size: int, stride: int) -> Tensor:
        """[C, 1, k, k] as oneDNN's opaque layout."""
        channels, _, kernel, _ = weight.shape
        return torch.ops.mkldnn._reorder_convolution_weight(  # type: ignore[no-any-return]
            weight.contiguous(), [kernel // 2] * 2, [stride, stride], [1, 1], channels, [16, channels, size, size]
        )

    @staticmethod
    def folded_pointwise(
        x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None, residual: Tensor | None = None
    ) -> Tensor:
        images, _, height, width = x.shape
        weight = weight.contiguous()  # a slice of a wider weight would run on oneDNN's reference code
        if residual is None:
            y = torch.ops.mkldnn._linear_pointwise(_rows(x), weight, bias, *TAILS[activation])
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(_rows(x), _rows(residual), weight, bias, "add")
        return y.view(images, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def folded_depthwise(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, activation: str | None) -> Tensor:
        margin = [weight.shape[-1] // 2] * 2
        return torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, margin, [stride, stride], [1, 1], weight.shape[0], *TAILS[activation]
        )

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
        residuals = [None] * len(scale) if residual is None else residual.chunk(len(scale))
        return _cat(
            [
                OneDNN.folded_pointwise(
                    part, (weight * s[:, None]).to(x.dtype), b.to(x.dtype), activation=activation, residual=shortcut
                )
                for part, s, b, shortcut in zip(x.chunk(len(scale)), scale, shift, residuals, strict=True)
            ]
        )

    @staticmethod
    def segmented_depthwise(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, activation: str | None
    ) -> Tensor:
        return _cat(
            [
                OneDNN.folded_depthwise(
                    part,
                    (weight * s[:, None, None, None]).to(x.dtype),
                    b.to(x.dtype),
                    stride=stride,
                    activation=activation,
                )
                for part, s, b in zip(x.chunk(len(scale)), scale, shift, strict=True)
            ]
        )


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] channels_last -> its view [N * H * W, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
