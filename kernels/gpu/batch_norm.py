"""Batch normalisation around the convolutions: statistics, finalize, apply, and their backward.

Convolutions leave per-program partial statistics; `finalize` turns them into scale and shift, which the next kernel
applies as it loads. Partials are reduced in a fixed order: no atomics, bit-equal results from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsnas.kernels.gpu.configs import elementwise_config, multiprocessors
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.gpu.support import activate, alignment, bn_backward, cdiv, int64, lets_through, merge_tile, round_to

# ---- statistics of a tensor that no kernel of ours produced (the stem's convolution)


@CachedLaunches
@triton.jit(do_not_specialize=["M", "C_units", "rows_per_program"])
def statistics_kernel(
    y, partial, counts, M, C_units, rows_per_program,
    ALIGN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    chunk = tl.program_id(0) % chunks
    program = tl.program_id(0) // chunks
    c = chunk * BC + tl.arange(0, BC)
    m = tl.arange(0, BM)
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    count = 0.0
    mean = tl.zeros((BC,), tl.float32)
    m2 = tl.zeros((BC,), tl.float32)
    for m0 in range(start, stop, BM):
        rows = tl.minimum(BM, stop - m0)
        valid = (m < rows)[:, None]
        base = y + int64(m0) * C
        tile = tl.load(base + m[:, None] * C + c[None, :], mask=valid & (c < C)[None, :], other=0.0).to(tl.float32)
        count, mean, m2 = merge_tile(count, mean, m2, tile, valid, rows.to(tl.float32))
    tl.store(partial + program * 2 * C + c, mean, mask=c < C)
    tl.store(partial + (program * 2 + 1) * C + c, m2, mask=c < C)
    if chunk == 0:
        tl.store(counts + program, count)


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """y [M, C] -> partial [P, 2, C], counts [P]."""
    rows, channels = y.shape
    align = alignment(channels)
    block_m, block_c, warps = elementwise_config(channels)
    chunks = cdiv(channels, block_c)
    programs = min(cdiv(rows, block_m), max(1, 4 * multiprocessors(y.device) // chunks))
    per_program = cdiv(cdiv(rows, block_m), programs) * block_m
    programs = cdiv(rows, per_program)
    partial = torch.empty((programs, 2, channels), device=y.device, dtype=torch.float32)
    counts = torch.empty((programs,), device=y.device, dtype=torch.float32)
    statistics_kernel[(programs * chunks,)](
        y, partial, counts, rows, channels // align, per_program,
        ALIGN=align, BM=block_m, BC=block_c, num_warps=warps,
    )  # fmt: skip
    return partial, counts


# ---- finalize: partial statistics or running ones -> scale, shift, mean, rstd, and the new running statistics


@CachedLaunches
@triton.jit(do_not_specialize=["P", "C_units"])
def finalize_kernel(
    partial, counts, gamma, beta, running_mean, running_var, batches, stats, P, C_units, M, momentum, eps,
    ALIGN: tl.constexpr, TRAINING: tl.constexpr, CUMULATIVE: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    old_mean = tl.load(running_mean + c, mask=inside, other=0.0)
    old_var = tl.load(running_var + c, mask=inside, other=1.0)
    if TRAINING:
        p = tl.arange(0, BP)
        mean_sum = tl.zeros((BC,), tl.float32)
        first = tl.load(partial + c, mask=inside, other=0.0)  # an origin near the mean: the sum below cannot cancel
        for p0 in range(0, P, BP):
            mask = (p0 + p < P)[:, None] & inside[None, :]
            rows = tl.load(counts + p0 + p, mask=p0 + p < P, other=0.0)
            means = tl.load(partial + (p0 + p)[:, None] * 2 * C + c[None, :], mask=mask, other=0.0)
            mean_sum += tl.sum((means - first[None, :]) * rows[:, None], 0)
        mean = first + mean_sum / M
        m2 = tl.zeros((BC,), tl.float32)
        for p0 in range(0, P, BP):
            mask = (p0 + p < P)[:, None] & inside[None, :]
            rows = tl.load(counts + p0 + p, mask=p0 + p < P, other=0.0)
            at = partial + (p0 + p)[:, None] * 2 * C + c[None, :]
            delta = tl.load(at, mask=mask, other=0.0) - mean[None, :]
            m2 += tl.sum(tl.load(at + C, mask=mask, other=0.0) + rows[:, None] * delta * delta, 0)
        var = m2 / M
        if CUMULATIVE:  # the caller has counted this batch already
            factor = 1.0 / tl.load(batches).to(tl.float32)
        else:
            factor = momentum
            if tl.program_id(0) == 0:
                tl.store(batches, tl.load(batches) + 1)
        tl.store(running_mean + c, old_mean + factor * (mean - old_mean), mask=inside)
        tl.store(running_var + c, old_var + factor * (m2 / (M - 1.0) - old_var), mask=inside)
    else:
        mean = old_mean
        var = old_var
    rstd = 1.0 / tl.sqrt(var + eps)
    scale = tl.load(gamma + c, mask=inside, other=0.0) * rstd
    shift = tl.load(beta + c, mask=inside, other=0.0) - mean * scale
    tl.store(stats + c, scale, mask=inside)
    tl.store(stats + C + c, shift, mask=inside)
    tl.store(stats + 2 * C + c, mean, mask=inside)
    tl.store(stats + 3 * C + c, rstd, mask=inside)


def finalize(
    partials: tuple[Tensor, Tensor] | None, affine: tuple[Tensor, Tensor],
    running: tuple[Tensor, Tensor, Tensor], rows: int, momentum: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """Statistics of `rows` values per channel -> stats [4, C]; running statistics move in place, as in BatchNorm2d.

    Without partials (evaluation) the running statistics are used and stay. momentum None is the cumulative average.
    """
    gamma, beta = affine
    running_mean, running_var, batches = running
    channels = gamma.shape[0]
    stats = torch.empty((4, channels), device=gamma.device, dtype=torch.float32)
    if partials is not None and momentum is None:
        batches.add_(1)
    partial, counts = partials if partials is not None else (stats, stats)
    align = alignment(channels)
    block_c = 16
    finalize_kernel[(cdiv(channels, block_c),)](
        partial, counts, gamma, beta, running_mean, running_var, batches, stats,
        partial.shape[0], channels // align, float(rows), float(momentum or 0.0), eps,
        ALIGN=align, TRAINING=partials is not None, CUMULATIVE=momentum is None, BP=128, BC=block_c, num_warps=4,
    )  # fmt: skip
    return stats


# ---- apply: the block's output, the one place where a normalised tensor is written


@CachedLaunches
@triton.jit(do_not_specialize=["M", "C_units"])
def apply_kernel(
    y, stats, residual, z, M, C_units,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    m0 = (tl.program_id(0) // chunks) * BM
    m = tl.arange(0, BM)
    mask = (m0 + m < M)[:, None] & (c < C)[None, :]
    offsets = int64(m0) * C + m[:, None] * C + c[None, :]
    scale = tl.load(stats + c, mask=c < C, other=0.0)[None, :]
    shift = tl.load(stats + C + c, mask=c < C, other=0.0)[None, :]
    out = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) * scale + shift
    if ACTIVATION is not None:
        out = activate(out, ACTIVATION)
    if RESIDUAL:
        out += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(z + offsets, round_to(out, z.dtype.element_ty), mask=mask)


def apply(
    y: Tensor, stats: Tensor, z: Tensor, *, activation: str | None = None, residual: Tensor | None = None
) -> None:
    """z = scale * y + shift, then the activation or + residual; all [M, C]."""
    rows, channels = y.shape
    align = alignment(channels)
    block_m, block_c, warps = elementwise_config(channels)
    apply_kernel[(cdiv(rows, block_m) * cdiv(channels, block_c),)](
        y, stats, z if residual is None else residual, z, rows, channels // align,
        ALIGN=align, ACTIVATION=activation, RESIDUAL=residual is not None, BM=block_m, BC=block_c, num_warps=warps,
    )  # fmt: skip


# ---- backward: sums of the gradient, finalize to the affine a, b, c, and its application where no kernel follows


@CachedLaunches
@triton.jit(do_not_specialize=["M", "C_units", "rows_per_program"])
def gradient_sums_kernel(
    grad, y, stats, partial, M, C_units, rows_per_program,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    program = tl.program_id(0) // chunks
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    m = tl.arange(0, BM)
    inside = c < C
    mean = tl.load(stats + 2 * C + c, mask=inside, other=0.0)[None, :]
    if ACTIVATION is not None:
        scale = tl.load(stats + c, mask=inside, other=0.0)[None, :]
        shift = tl.load(stats + C + c, mask=inside, other=0.0)[None, :]
    sums = tl.zeros((BM, BC), tl.float32)
    weighted = tl.zeros((BM, BC), tl.float32)
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    for m0 in range(start, stop, BM):
        mask = (m0 + m < stop)[:, None] & inside[None, :]
        offsets = int64(m0) * C + m[:, None] * C + c[None, :]
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        if ACTIVATION is not None:
            g = tl.where(lets_through(scale * v + shift, ACTIVATION), g, 0.0)
        sums += g
        weighted += g * (v - mean)
    tl.store(partial + program * 2 * C + c, tl.sum(sums, 0), mask=inside)
    tl.store(partial + (program * 2 + 1) * C + c, tl.sum(weighted, 0), mask=inside)


def gradient_sums(grad: Tensor, y: Tensor, stats: Tensor, *, activation: str | None = None) -> Tensor:
    """grad, y [M, C] -> partial [P, 2, C]: sums of grad and of grad * (y - mean), masked by the activation if any."""
    rows, channels = y.shape
    align = alignment(channels)
    block_m, block_c, warps = elementwise_config(channels)
    chunks = cdiv(channels, block_c)
    programs = min(cdiv(rows, block_m), max(1, 4 * multiprocessors(y.device) // chunks))
    per_program = cdiv(cdiv(rows, block_m), programs) * block_m
    programs = cdiv(rows, per_program)
    partial = torch.empty((programs, 2, channels), device=y.device, dtype=torch.float32)
    gradient_sums_kernel[(programs * chunks,)](
        grad, y, stats, partial, rows, channels // align, per_program,
        ALIGN=align, ACTIVATION=activation, BM=block_m, BC=block_c, num_warps=warps,
    )  # fmt: skip
    return partial


@CachedLaunches
@triton.jit(do_not_specialize=["P", "C_units"])
def finalize_backward_kernel(
    partial, stats, coefficients, grad_gamma, grad_beta, P, C_units, M,
    ALIGN: tl.constexpr, TRAINING: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    C = C_units * ALIGN
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    inside = c < C
    p = tl.arange(0, BP)
    sums = tl.zeros((BP, BC), tl.float32)
    weighted = tl.zeros((BP, BC), tl.float32)
    for p0 in range(0, P, BP):
        mask = (p0 + p < P)[:, None] & inside[None, :]
        at = partial + (p0 + p)[:, None] * 2 * C + c[None, :]
        sums += tl.load(at, mask=mask, other=0.0)
        weighted += tl.load(at + C, mask=mask, other=0.0)
    total = tl.sum(sums, 0)
    total_weighted = tl.sum(weighted, 0)
    a = tl.load(stats + c, mask=inside, other=0.0)
    mean = tl.load(stats + 2 * C + c, mask=inside, other=0.0)
    rstd = tl.load(stats + 3 * C + c, mask=inside, other=0.0)
    tl.store(grad_gamma + c, total_weighted * rstd, mask=inside)
    tl.store(grad_beta + c, total, mask=inside)
    if TRAINING:
        b = -a * rstd * rstd * total_weighted / M
        offset = -a * total / M - b * mean
    else:  # running statistics are constants
        b = tl.zeros((BC,), tl.float32)
        offset = tl.zeros((BC,), tl.float32)
    tl.store(coefficients + c, a, mask=inside)
    tl.store(coefficients + C + c, b, mask=inside)
    tl.store(coefficients + 2 * C + c, offset, mask=inside)


def finalize_backward(partial: Tensor, stats: Tensor, rows: int, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of `rows` values per channel -> coefficients [3, C], gradients of the norm's weight [C] and bias [C]."""
    channels = stats.shape[1]
    coefficients = torch.empty((3, channels), device=stats.device, dtype=torch.float32)
    grad_gamma = torch.empty((channels,), device=stats.device, dtype=torch.float32)
    grad_beta = torch.empty_like(grad_gamma)
    align = alignment(channels)
    block_c = 16
    finalize_backward_kernel[(cdiv(channels, block_c),)](
        partial, stats, coefficients, grad_gamma, grad_beta, partial.shape[0], channels // align, float(rows),
        ALIGN=align, TRAINING=training, BP=64, BC=block_c, num_warps=4,
    )  # fmt: skip
    return coefficients, grad_gamma, grad_beta


@CachedLaunches
@triton.jit(do_not_specialize=["M", "C_units"])
def apply_backward_kernel(
    grad, y, coefficients, out, M, C_units, ALIGN: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    m0 = (tl.program_id(0) // chunks) * BM
    m = tl.arange(0, BM)
    mask = (m0 + m < M)[:, None] & (c < C)[None, :]
    offsets = int64(m0) * C + m[:, None] * C + c[None, :]
    a = tl.load(coefficients + c, mask=c < C, other=0.0)[None, :]
    b = tl.load(coefficients + C + c, mask=c < C, other=0.0)[None, :]
    offset = tl.load(coefficients + 2 * C + c, mask=c < C, other=0.0)[None, :]
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, round_to(bn_backward(g, v, a, b, offset, a, b, None), out.dtype.element_ty), mask=mask)


def apply_backward(grad: Tensor, y: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """out = a * grad + b * y + c; all [M, C]."""
    rows, channels = y.shape
    align = alignment(channels)
    block_m, block_c, warps = elementwise_config(channels)
    apply_backward_kernel[(cdiv(rows, block_m) * cdiv(channels, block_c),)](
        grad, y, coefficients, out, rows, channels // align, ALIGN=align, BM=block_m, BC=block_c, num_warps=warps
    )
