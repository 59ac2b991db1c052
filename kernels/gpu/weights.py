"""Weights of a block: slices read from the float32 masters, and gradients written back into slices of their size.

One launch a block prepares what the kernels read: pointwise slices in the compute dtype (what autocast would do in two
launches) and depthwise taps as [k * k, C], so that neighbouring threads read neighbouring channels. In float32 the
pointwise kernels read the masters in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsnas.kernels.block import BlockShape, BlockWeights
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.gpu.support import alignment, cdiv, round_to

BLOCK = 1024


@triton.jit
def _copy_slice(source, target, block, rows, cols, stride, BLOCK: tl.constexpr):
    e = block * BLOCK + tl.arange(0, BLOCK)
    mask = e < rows * cols
    value = tl.load(source + (e // cols) * stride + e % cols, mask=mask, other=0.0)
    tl.store(target + e, round_to(value, target.dtype.element_ty), mask=mask)


@CachedLaunches
@triton.jit(
    do_not_specialize=[
        "blocks_1",
        "blocks_3",
        "hidden_units",
        "input_units",
        "outputs",
        "expand_stride_units",
        "project_stride_units",
    ]
)
def prepare_weights_kernel(
    expand, depthwise, project, expand_out, taps, project_out, blocks_1, blocks_3,
    hidden_units, input_units, outputs, expand_stride_units, project_stride_units,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, K_MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    hidden = hidden_units * ALIGN
    inputs = input_units * ALIGN
    expand_stride = expand_stride_units * ALIGN
    project_stride = project_stride_units * ALIGN
    block = tl.program_id(0)
    if block < blocks_1:
        _copy_slice(expand, expand_out, block, hidden, inputs, expand_stride, BLOCK)
    elif block < blocks_1 + blocks_3:
        _copy_slice(project, project_out, block - blocks_1, outputs, hidden, project_stride, BLOCK)
    else:
        e = (block - blocks_1 - blocks_3) * BLOCK + tl.arange(0, BLOCK)
        tap, c = e // hidden, e % hidden
        mask = e < KERNEL * KERNEL * hidden
        at = c * K_MAX * K_MAX + (tap // KERNEL + (K_MAX - KERNEL) // 2) * K_MAX + tap % KERNEL + (K_MAX - KERNEL) // 2
        tl.store(taps + e, tl.load(depthwise + at, mask=mask, other=0.0), mask=mask)


def prepare_weights(
    weights: BlockWeights, shape: BlockShape, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """-> expand [hidden, in] in dtype, taps [k * k, hidden] float32, project [out, hidden] in dtype.

    Where dtype is the weights' own, expand and project are the weights themselves, to be read as slices.
    """
    expand, depthwise, project = weights
    device = project.device
    expand_out, project_out = expand, project
    blocks_1 = blocks_3 = 0
    if dtype != project.dtype:
        project_out = torch.empty((shape.out_channels, shape.hidden), device=device, dtype=dtype)
        blocks_3 = cdiv(project_out.numel(), BLOCK)
        if expand is not None:
            expand_out = torch.empty((shape.hidden, shape.in_channels), device=device, dtype=dtype)
            blocks_1 = cdiv(expand_out.numel(), BLOCK)
    taps = torch.empty((shape.kernel**2, shape.hidden), device=device, dtype=torch.float32)
    strides = (project if expand is None else expand).stride(0), project.stride(0)
    align = alignment(shape.hidden, shape.in_channels, *strides)
    prepare_weights_kernel[(blocks_1 + blocks_3 + cdiv(taps.numel(), BLOCK),)](
        project if expand is None else expand, depthwise, project,
        project_out if expand_out is None else expand_out, taps, project_out, blocks_1, blocks_3,
        shape.hidden // align, shape.in_channels // align, shape.out_channels, *(stride // align for stride in strides),
        ALIGN=align, KERNEL=shape.kernel, K_MAX=depthwise.shape[-1], BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return expand_out, taps, project_out


# ---- gradients: partials of the programs, summed in order into the slice of a full-size gradient, zero elsewhere


@triton.jit
def _reduce_pointwise(
    partial, out, block, programs, rows, cols, full_rows, full_cols, BP: tl.constexpr, BE: tl.constexpr
):
    e = block * BE + tl.arange(0, BE)
    row, col = e // full_cols, e % full_cols
    inside = (row < rows) & (col < cols)
    p = tl.arange(0, BP)
    total = tl.zeros((BP, BE), tl.float32)
    for p0 in range(0, programs, BP):
        at = (p0 + p).to(tl.int64)[:, None] * (rows * cols) + (row * cols + col)[None, :]
        total += tl.load(partial + at, mask=(p0 + p < programs)[:, None] & inside[None, :], other=0.0)
    tl.store(out + e, tl.sum(total, 0), mask=row < full_rows)


@CachedLaunches
@triton.jit(
    do_not_specialize=[
        "blocks_1",
        "blocks_3",
        "expand_programs",
        "taps_programs",
        "project_programs",
        "hidden_units",
        "input_units",
        "outputs",
        "expand_rows",
        "expand_col_units",
        "depthwise_row_units",
        "project_rows",
        "project_col_units",
    ]
)
def reduce_gradients_kernel(
    expand_partial, taps_partial, project_partial, expand, depthwise, project, blocks_1, blocks_3,
    expand_programs, taps_programs, project_programs, hidden_units, input_units, outputs,
    expand_rows, expand_col_units, depthwise_row_units, project_rows, project_col_units,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, K_MAX: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    hidden = hidden_units * ALIGN
    inputs = input_units * ALIGN
    expand_cols = expand_col_units * ALIGN
    depthwise_rows = depthwise_row_units * ALIGN
    project_cols = project_col_units * ALIGN
    block = tl.program_id(0)
    if block < blocks_1:
        _reduce_pointwise(
            expand_partial, expand, block, expand_programs, hidden, inputs, expand_rows, expand_cols, BP, BE
        )
    elif block < blocks_1 + blocks_3:
        _reduce_pointwise(
            project_partial, project, block - blocks_1, project_programs, outputs, hidden,
            project_rows, project_cols, BP, BE,
        )  # fmt: skip
    else:
        e = (block - blocks_1 - blocks_3) * BE + tl.arange(0, BE)
        cell, c = e // depthwise_rows, e % depthwise_rows  # channels vary fastest, as in the partials
        ky = cell // K_MAX - (K_MAX - KERNEL) // 2
        kx = cell % K_MAX - (K_MAX - KERNEL) // 2
        inside = (ky >= 0) & (ky < KERNEL) & (kx >= 0) & (kx < KERNEL) & (c < hidden)
        p = tl.arange(0, BP)
        total = tl.zeros((BP, BE), tl.float32)
        for p0 in range(0, taps_programs, BP):
            tap = (p0 + p).to(tl.int64)[:, None] * (KERNEL * KERNEL) + (ky * KERNEL + kx)[None, :]
            mask = (p0 + p < taps_programs)[:, None] & inside[None, :]
            total += tl.load(taps_partial + tap * hidden + c[None, :], mask=mask, other=0.0)
        tl.store(depthwise + c * K_MAX * K_MAX + cell, tl.sum(total, 0), mask=cell < K_MAX * K_MAX)


def reduce_gradients(
    expand_partial: Tensor | None, taps_partial: Tensor, project_partial: Tensor, weights: BlockWeights,
    shape: BlockShape,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Partials [P, hidden, in], [P, k * k, hidden], [P, out, hidden] -> the weights' gradients, full size, float32."""
    block_e = 128
    depthwise = torch.empty_like(weights.depthwise)
    project = torch.empty_like(weights.project)
    expand = None if weights.expand is None else torch.empty_like(weights.expand)
    blocks_1 = 0 if expand is None else cdiv(expand.numel(), block_e)
    blocks_3 = cdiv(project.numel(), block_e)
    expand_rows, expand_cols = project.shape if expand is None else expand.shape
    align = alignment(shape.hidden, shape.in_channels, expand_cols, depthwise.shape[0], project.shape[1])
    reduce_gradients_kernel[(blocks_1 + blocks_3 + cdiv(depthwise.numel(), block_e),)](
        project_partial if expand_partial is None else expand_partial, taps_partial, project_partial,
        project if expand is None else expand, depthwise, project, blocks_1, blocks_3,
        1 if expand_partial is None else expand_partial.shape[0], taps_partial.shape[0], project_partial.shape[0],
        shape.hidden // align, shape.in_channels // align, shape.out_channels,
        expand_rows, expand_cols // align, depthwise.shape[0] // align, project.shape[0], project.shape[1] // align,
        ALIGN=align, KERNEL=shape.kernel, K_MAX=depthwise.shape[-1], BP=32, BE=block_e, num_warps=4,
    )  # fmt: skip
    return expand, depthwise, project


@CachedLaunches
@triton.jit(do_not_specialize=["programs", "rows", "col_units", "full_rows", "full_col_units"])
def _reduce_one_kernel(
    partial, out, programs, rows, col_units, full_rows, full_col_units,
    ALIGN: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    cols, full_cols = col_units * ALIGN, full_col_units * ALIGN
    _reduce_pointwise(partial, out, tl.program_id(0), programs, rows, cols, full_rows, full_cols, BP, BE)


def reduce_pointwise_gradient(partial: Tensor, weight: Tensor) -> Tensor:
    """Partial [P, out, in] -> gradient of weight [out_max, in_max], float32."""
    out = torch.empty_like(weight)
    programs, rows, cols = partial.shape
    align = alignment(cols, weight.shape[1])
    _reduce_one_kernel[(cdiv(out.numel(), 128),)](
        partial, out, programs, rows, cols // align, weight.shape[0], weight.shape[1] // align,
        ALIGN=align, BP=32, BE=128, num_warps=4,
    )  # fmt: skip
    return out
