"""Convolutions of networks that do not train, on Triton: see kernels/inference.py, whose backend `Triton` is.

Scale and shift of a segment (a network's own batch normalisation; one segment when it is folded into the weights),
activation and shortcut happen in the convolution's epilogue, so every tensor is written once and read once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsnas.kernels.gpu.configs import multiprocessors, pointwise_config
from bsnas.kernels.gpu.depthwise import depthwise_forward, output_size
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.gpu.pointwise import split_rows
from bsnas.kernels.gpu.support import activate, alignment, cdiv, dot, int64, round_to


@CachedLaunches
@triton.jit(do_not_specialize=["K_units", "N_units", "rows_per_segment", "rows_per_program", "programs_per_segment"])
def pointwise_inference_kernel(
    x, w, scale, shift, residual, y, K_units, N_units, rows_per_segment, rows_per_program, programs_per_segment,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[m, n] = scale[s, n] * (x @ w^T)[m, n] + shift[s, n] for m's segment s, + residual, then activation.

    A program's rows are all of one segment.
    """
    K = K_units * ALIGN
    N = N_units * ALIGN
    tiles_n = tl.cdiv(N, BN)
    n = (tl.program_id(0) % tiles_n) * BN + tl.arange(0, BN)
    program = tl.program_id(0) // tiles_n
    k = tl.arange(0, BK)
    m = tl.arange(0, BM)
    segment = program // programs_per_segment
    first = segment * rows_per_segment
    start = first + program % programs_per_segment * rows_per_program
    stop = tl.minimum(start + rows_per_program, first + rows_per_segment)
    bias = tl.load(shift + segment * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if scale is not None:
        factor = tl.load(scale + segment * N + n, mask=n < N, other=0.0)[None, :]
    for m0 in range(start, stop, BM):
        valid = (m0 + m < stop)[:, None]
        row = int64(m0)
        acc = tl.zeros((BM, BN), tl.float32)
        for k0 in range(0, K, BK):
            inside = k0 + k < K
            a = tl.load(x + row * K + m[:, None] * K + k0 + k[None, :], mask=valid & inside[None, :], other=0.0)
            b = tl.load(w + n[None, :] * K + k0 + k[:, None], mask=inside[:, None] & (n < N)[None, :], other=0.0)
            acc = dot(a, b, acc)
        mask = valid & (n < N)[None, :]
        if scale is not None:
            acc *= factor
        out = acc + bias
        if residual is not None:
            at_rows = row * N + m[:, None] * N + n[None, :]
            out += tl.load(residual + at_rows, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            out = activate(out, ACTIVATION)
        tl.store(y + row * N + m[:, None] * N + n[None, :], round_to(out, y.dtype.element_ty), mask=mask)


def _pointwise(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, activation: str | None, residual: Tensor | None
) -> Tensor:
    """x [S * n, in, H, W]; scale (or None for 1), shift [S, out] -> [S * n, out, H, W] channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous()
    images, inner, height, width = x.shape
    outer = weight.shape[0]
    rows, segments = images * height * width, shift.shape[0]
    y = torch.empty((images, height, width, outer), dtype=x.dtype, device=x.device).permute(0, 3, 1, 2)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    align = alignment(inner, outer)
    config = pointwise_config(x.permute(0, 2, 3, 1).reshape(rows, inner), inner, outer, prologue=inner > outer)
    tiles_n = cdiv(outer, config.block_n)
    per_program, programs = split_rows(
        rows // segments, config.block_m, max(1, config.waves * multiprocessors(x.device) // (tiles_n * segments))
    )
    pointwise_inference_kernel[(segments * programs * tiles_n,)](
        x, weight, scale, shift, residual, y,
        inner // align, outer // align, rows // segments, per_program, programs,
        ALIGN=align, ACTIVATION=activation,
        BM=config.block_m, BN=config.block_n, BK=config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return y


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, k, k] -> [k * k, C] float32, as the kernel reads them."""
    return weight.reshape(weight.shape[0], -1).t().contiguous().float()


def _depthwise(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor, stride: int, activation: str | None
) -> Tensor:
    """x [S * n, C, H, W], weight [C, 1, k, k] or its taps; scale (or None for 1), shift [S, C] float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    taps = weight if weight.dim() == 2 else _taps(weight)
    kernel = math.isqrt(taps.shape[0])
    out = (images, output_size(height, stride), output_size(width, stride), channels)
    y = torch.empty(out, dtype=x.dtype, device=x.device)
    depthwise_forward(
        x.permute(0, 2, 3, 1),
        taps,
        y,
        None,
        kernel,
        stride,
        statistics=False,
        activation=activation,
        epilogue=(scale, shift),
    )
    return y.permute(0, 3, 1, 2)


class Triton:
    """The backend `triton` of kernels/inference.py; float32, bfloat16 or float16, channels_last."""

    @staticmethod
    def packed_depthwise(weight: Tensor, size: int, stride: int) -> Tensor:
        return _taps(weight)

    @staticmethod
    def folded_pointwise(
        x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None, residual: Tensor | None = None
    ) -> Tensor:
        return _pointwise(x, weight, None, bias[None], activation, residual)

    @staticmethod
    def folded_depthwise(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, activation: str | None) -> Tensor:
        return _depthwise(x, weight, None, bias[None].float(), stride, activation)

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
        return _pointwise(x, weight, scale, shift, activation, residual)

    @staticmethod
    def segmented_depthwise(
        x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *, stride: int, activation: str | None
    ) -> Tensor:
        return _depthwise(x, weight, scale, shift, stride, activation)
