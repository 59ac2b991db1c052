# ruff: noqa: RUF005, B007  (Triton grows tuples by +, and its unrolled loops need a counter)
"""Pointwise (1x1) convolution: a tall and skinny matrix product, bound by the bytes of its widest operand.

Every kernel reads each wide tensor once. A program keeps its slice of the weight and walks down the pixels, so partial
statistics and weight gradients stay in registers until it ends. Batch norm and activation of the input, and the affine
form of a batch norm's backward, are applied as operands are loaded; only raw convolution outputs are ever stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsnas.kernels.gpu.batch_norm import apply_backward
from bsnas.kernels.gpu.configs import (
    PointwiseConfig,
    expand_backward_config,
    input_gradient_config,
    multiprocessors,
    pointwise_config,
    project_backward_config,
    weight_gradient_config,
)  # fmt: skip
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.gpu.support import (
    activate,
    alignment,
    bn_backward,
    cdiv,
    dot,
    int64,
    lets_through,
    merge_tile,
    round_to,
)  # fmt: skip

# ---- forward


@CachedLaunches
@triton.jit(do_not_specialize=["M", "K_units", "N_units", "w_stride_units", "rows_per_program"])
def pointwise_forward_kernel(
    x, stats, w, y, partial, counts, M, K_units, N_units, w_stride_units, rows_per_program,
    ALIGN: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr, STATISTICS: tl.constexpr,
    ONE_STEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y[M, N] = f(x[M, K]) @ w[:N, :K]^T with f the identity or, in PROLOGUE, act(scale * x + shift)."""
    K = K_units * ALIGN
    N = N_units * ALIGN
    w_stride = w_stride_units * ALIGN
    tiles_n = tl.cdiv(N, BN)
    tile_n = tl.program_id(0) % tiles_n  # neighbours share rows of x, which the second one finds in L2
    program = tl.program_id(0) // tiles_n
    n = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    m = tl.arange(0, BM)
    dtype: tl.constexpr = y.dtype.element_ty
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    if ONE_STEP:
        weight = tl.load(w + n[None, :] * w_stride + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        if PROLOGUE:
            scale = tl.load(stats + k, mask=k < K, other=0.0)[None, :]
            shift = tl.load(stats + K + k, mask=k < K, other=0.0)[None, :]
    count = 0.0
    mean = tl.zeros((BN,), tl.float32)
    m2 = tl.zeros((BN,), tl.float32)
    for m0 in range(start, stop, BM):
        rows = tl.minimum(BM, stop - m0)
        valid = (m < rows)[:, None]
        x_rows = x + int64(m0) * K + m[:, None] * K
        acc = tl.zeros((BM, BN), tl.float32)
        if ONE_STEP:
            a = tl.load(x_rows + k[None, :], mask=valid & (k < K)[None, :], other=0.0)
            if PROLOGUE:
                a = round_to(activate(a.to(tl.float32) * scale + shift, ACTIVATION), dtype)
            acc = dot(a, weight, acc)
        else:
            for k0 in range(0, K, BK):
                inside = k0 + k < K
                a = tl.load(x_rows + k0 + k[None, :], mask=valid & inside[None, :], other=0.0)
                b = tl.load(
                    w + n[None, :] * w_stride + k0 + k[:, None], mask=inside[:, None] & (n < N)[None, :], other=0.0
                )
                if PROLOGUE:
                    step_scale = tl.load(stats + k0 + k, mask=inside, other=0.0)[None, :]
                    step_shift = tl.load(stats + K + k0 + k, mask=inside, other=0.0)[None, :]
                    a = round_to(activate(a.to(tl.float32) * step_scale + step_shift, ACTIVATION), dtype)
                acc = dot(a, b, acc)
        out = round_to(acc, dtype)
        tl.store(y + int64(m0) * N + m[:, None] * N + n[None, :], out, mask=valid & (n < N)[None, :])
        if STATISTICS:
            count, mean, m2 = merge_tile(count, mean, m2, out.to(tl.float32), valid, rows.to(tl.float32))
    if STATISTICS:
        tl.store(partial + program * 2 * N + n, mean, mask=n < N)
        tl.store(partial + (program * 2 + 1) * N + n, m2, mask=n < N)
        if tile_n == 0:
            tl.store(counts + program, count)


def split_rows(rows: int, block_m: int, programs: int) -> tuple[int, int]:
    """Rows per program, a multiple of block_m, and how many programs that gives; at most `programs`."""
    tiles = cdiv(rows, block_m)
    per_program = cdiv(tiles, max(1, min(programs, tiles))) * block_m
    return per_program, cdiv(rows, per_program)


def pointwise_forward(
    x: Tensor, weight: Tensor, y: Tensor, stats: Tensor | None, *, statistics: bool, activation: str | None = None,
    config: PointwiseConfig | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """x [M, K], weight [N.., K..] with unit column stride, y [M, N] -> partial statistics of y, if asked for.

    With `stats`, x passes that norm and the activation as it is loaded.
    """
    rows, inner = x.shape
    outer = y.shape[1]
    align = alignment(inner, outer, weight.stride(0))
    config = config or pointwise_config(x, inner, outer, stats is not None)
    tiles_n = cdiv(outer, config.block_n)
    per_program, programs = split_rows(
        rows, config.block_m, max(1, config.waves * multiprocessors(x.device) // tiles_n)
    )
    partial = counts = None
    if statistics:
        partial = torch.empty((programs, 2, outer), device=x.device, dtype=torch.float32)
        counts = torch.empty((programs,), device=x.device, dtype=torch.float32)
    pointwise_forward_kernel[(programs * tiles_n,)](
        x, stats, weight, y, partial, counts,
        rows, inner // align, outer // align, weight.stride(0) // align, per_program,
        ALIGN=align, PROLOGUE=stats is not None, ACTIVATION=activation, STATISTICS=statistics,
        ONE_STEP=config.block_k >= inner, BM=config.block_m, BN=config.block_n, BK=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return None if partial is None or counts is None else (partial, counts)


# ---- backward of the projection: the wide tensor is its input, which is read once for both gradients


@CachedLaunches
@triton.jit(do_not_specialize=["M", "OUT_units", "H_units", "w_stride_units", "rows_per_program"])
def project_backward_kernel(
    grad, y3, coefficients, w, y2, stats, dz2, partial, w_partial, M, OUT_units, H_units, w_stride_units,
    rows_per_program,
    ALIGN: tl.constexpr, AFFINE: tl.constexpr, ACTIVATION: tl.constexpr, OUT_TILES: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dz2 = (dy3 @ w) * act'(bn2(y2)); w_partial[program] = dy3^T @ act(bn2(y2)); sums of dz2.

    dy3 = a * grad + b * y3 + c [M, OUT], or grad itself without AFFINE; w [OUT, H]; one program holds BH of H and walks
    down its rows.
    """
    OUT = OUT_units * ALIGN
    H = H_units * ALIGN
    w_stride = w_stride_units * ALIGN
    tiles_h = tl.cdiv(H, BH)
    program = tl.program_id(0) // tiles_h
    h = (tl.program_id(0) % tiles_h) * BH + tl.arange(0, BH)
    o = tl.arange(0, BO)
    m = tl.arange(0, BM)
    dtype: tl.constexpr = dz2.dtype.element_ty
    scale = tl.load(stats + h, mask=h < H, other=0.0)[None, :]
    shift = tl.load(stats + H + h, mask=h < H, other=0.0)[None, :]
    mean = tl.load(stats + 2 * H + h, mask=h < H, other=0.0)[None, :]
    weights = ()
    w_grads = ()
    for t in tl.static_range(OUT_TILES):
        at = w + (t * BO + o)[:, None] * w_stride + h[None, :]
        weights = weights + (tl.load(at, mask=(t * BO + o < OUT)[:, None] & (h < H)[None, :], other=0.0),)
        w_grads = w_grads + (tl.zeros((BH, BO), tl.float32),)
    sums = tl.zeros((BH,), tl.float32)
    weighted = tl.zeros((BH,), tl.float32)
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    for m0 in range(start, stop, BM):
        valid = (m0 + m < stop)[:, None]
        row = int64(m0)
        wide = row * H + m[:, None] * H + h[None, :]
        wide_mask = valid & (h < H)[None, :]
        raw = tl.load(y2 + wide, mask=wide_mask, other=0.0).to(tl.float32)
        u = scale * raw + shift
        activation = round_to(activate(u, ACTIVATION), dtype)
        gradient = tl.zeros((BM, BH), tl.float32)
        new_grads = ()
        for t in tl.static_range(OUT_TILES):
            channel = t * BO + o
            inside = channel < OUT
            narrow = row * OUT + m[:, None] * OUT + channel[None, :]
            mask = valid & inside[None, :]
            dy3 = tl.load(grad + narrow, mask=mask, other=0.0)
            if AFFINE:
                v = tl.load(y3 + narrow, mask=mask, other=0.0).to(tl.float32)
                a = tl.load(coefficients + channel, mask=inside, other=0.0)[None, :]
                b = tl.load(coefficients + OUT + channel, mask=inside, other=0.0)[None, :]
                c = tl.load(coefficients + 2 * OUT + channel, mask=inside, other=0.0)[None, :]
                dy3 = round_to(tl.where(valid, a * dy3.to(tl.float32) + b * v + c, 0.0), dtype)
            gradient = dot(dy3, weights[t], gradient)
            new_grads = new_grads + (dot(tl.trans(activation), dy3, w_grads[t]),)
        w_grads = new_grads
        out = round_to(tl.where(lets_through(u, ACTIVATION), gradient, 0.0), dtype)
        tl.store(dz2 + wide, out, mask=wide_mask)
        kept = out.to(tl.float32)
        sums += tl.sum(kept, 0)
        weighted += tl.sum(kept * (raw - mean), 0)
    tl.store(partial + program * 2 * H + h, sums, mask=h < H)
    tl.store(partial + (program * 2 + 1) * H + h, weighted, mask=h < H)
    for t in tl.static_range(OUT_TILES):
        channel = t * BO + o
        at = w_partial + program.to(tl.int64) * OUT * H + channel[None, :] * H + h[:, None]
        tl.store(at, w_grads[t], mask=(channel < OUT)[None, :] & (h < H)[:, None])


def project_backward(
    grad: Tensor, y3: Tensor, coefficients: Tensor, weight: Tensor, y2: Tensor, stats: Tensor, dz2: Tensor, *,
    activation: str, config: PointwiseConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad, y3 [M, OUT], weight [OUT.., H..], y2, dz2 [M, H] -> partial sums [P, 2, H], weight gradients [P, OUT, H].

    Every program of a row computes dy3 anew. Past four of them (BH of H each) it is written once instead, by a kernel
    of its own: 2 x OUT more values to move a row, which stay in L2 on the small maps where this happens.
    """
    rows, hidden = y2.shape
    out = y3.shape[1]
    align = alignment(hidden, out, weight.stride(0))
    config = config or project_backward_config(y2, hidden, out)
    tiles_h = cdiv(hidden, config.block_n)
    affine = tiles_h <= 4
    if not affine:
        dy3 = torch.empty_like(y3)
        apply_backward(grad, y3, coefficients, dy3)
        grad = dy3
    per_program, programs = split_rows(
        rows, config.block_m, max(1, config.waves * multiprocessors(y2.device) // tiles_h)
    )
    partial = torch.empty((programs, 2, hidden), device=y2.device, dtype=torch.float32)
    w_partial = torch.empty((programs, out, hidden), device=y2.device, dtype=torch.float32)
    project_backward_kernel[(programs * tiles_h,)](
        grad, y3, coefficients, weight, y2, stats, dz2, partial, w_partial,
        rows, out // align, hidden // align, weight.stride(0) // align, per_program,
        ALIGN=align, AFFINE=affine, ACTIVATION=activation, OUT_TILES=cdiv(out, config.block_k),
        BM=config.block_m, BH=config.block_n, BO=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return partial, w_partial


# ---- backward of the expansion: the wide tensors are its output and the gradient there


@CachedLaunches
@triton.jit(do_not_specialize=["M", "H_units", "IN_units", "w_stride_units", "rows_per_program"])
def expand_backward_kernel(
    grad, y1, coefficients, w, x, shortcut, dx, w_partial, M, H_units, IN_units, w_stride_units, rows_per_program,
    ALIGN: tl.constexpr, SHORTCUT: tl.constexpr, H_TILES: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dx = dy1 @ w (+ shortcut) and w_partial[program] = dy1^T @ x in one pass, where H x IN sums fit in registers.

    dy1 = a * grad + b * y1 + c [M, H]; w [H, IN]; x [M, IN].
    """
    H = H_units * ALIGN
    IN = IN_units * ALIGN
    w_stride = w_stride_units * ALIGN
    program = tl.program_id(0)
    h = tl.arange(0, BH)
    i = tl.arange(0, BI)
    m = tl.arange(0, BM)
    dtype: tl.constexpr = dx.dtype.element_ty
    w_grads = ()
    for t in tl.static_range(H_TILES):
        w_grads = w_grads + (tl.zeros((BH, BI), tl.float32),)
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    for m0 in range(start, stop, BM):
        valid = (m0 + m < stop)[:, None]
        row = int64(m0)
        narrow = row * IN + m[:, None] * IN + i[None, :]
        narrow_mask = valid & (i < IN)[None, :]
        inputs = tl.load(x + narrow, mask=narrow_mask, other=0.0)
        out = tl.zeros((BM, BI), tl.float32)
        new_grads = ()
        for t in tl.static_range(H_TILES):
            channel = t * BH + h
            inside = channel < H
            wide = row * H + m[:, None] * H + channel[None, :]
            mask = valid & inside[None, :]
            g = tl.load(grad + wide, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(y1 + wide, mask=mask, other=0.0).to(tl.float32)
            a = tl.load(coefficients + channel, mask=inside, other=0.0)[None, :]
            b = tl.load(coefficients + H + channel, mask=inside, other=0.0)[None, :]
            c = tl.load(coefficients + 2 * H + channel, mask=inside, other=0.0)[None, :]
            dy1 = round_to(tl.where(valid, a * g + b * v + c, 0.0), dtype)
            weight = tl.load(
                w + channel[:, None] * w_stride + i[None, :], mask=inside[:, None] & (i < IN)[None, :], other=0.0
            )
            out = dot(dy1, weight, out)
            new_grads = new_grads + (dot(tl.trans(dy1), inputs, w_grads[t]),)
        w_grads = new_grads
        if SHORTCUT:
            out += tl.load(shortcut + narrow, mask=narrow_mask, other=0.0).to(tl.float32)
        tl.store(dx + narrow, round_to(out, dtype), mask=narrow_mask)
    for t in tl.static_range(H_TILES):
        channel = t * BH + h
        at = w_partial + program.to(tl.int64) * H * IN + channel[:, None] * IN + i[None, :]
        tl.store(at, w_grads[t], mask=(channel < H)[:, None] & (i < IN)[None, :])


@CachedLaunches
@triton.jit(do_not_specialize=["M", "H_units", "IN_units", "w_stride_units"])
def input_gradient_kernel(
    grad, y, stats, coefficients, w, shortcut, dx, M, H_units, IN_units, w_stride_units,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, SHORTCUT: tl.constexpr,
    BM: tl.constexpr, BI: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dx = dy @ w (+ shortcut), for weights too large for `expand_backward_kernel`.

    grad is the one at y's norm, or at the ACTIVATION after it, as in the tail.
    """
    H = H_units * ALIGN
    IN = IN_units * ALIGN
    w_stride = w_stride_units * ALIGN
    tiles_i = tl.cdiv(IN, BI)
    i = (tl.program_id(0) % tiles_i) * BI + tl.arange(0, BI)
    m0 = (tl.program_id(0) // tiles_i) * BM
    m = tl.arange(0, BM)
    h = tl.arange(0, BH)
    valid = (m0 + m < M)[:, None]
    row = int64(m0)
    dtype: tl.constexpr = dx.dtype.element_ty
    out = tl.zeros((BM, BI), tl.float32)
    for h0 in range(0, H, BH):
        channel = h0 + h
        inside = channel < H
        wide = row * H + m[:, None] * H + channel[None, :]
        mask = valid & inside[None, :]
        g = tl.load(grad + wide, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(y + wide, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(
            w + channel[:, None] * w_stride + i[None, :], mask=inside[:, None] & (i < IN)[None, :], other=0.0
        )
        a = tl.load(coefficients + channel, mask=inside, other=0.0)[None, :]
        b = tl.load(coefficients + H + channel, mask=inside, other=0.0)[None, :]
        c = tl.load(coefficients + 2 * H + channel, mask=inside, other=0.0)[None, :]
        scale = a
        shift = b
        if ACTIVATION is not None:
            scale = tl.load(stats + channel, mask=inside, other=0.0)[None, :]
            shift = tl.load(stats + H + channel, mask=inside, other=0.0)[None, :]
        out = dot(round_to(bn_backward(g, v, a, b, c, scale, shift, ACTIVATION), dtype), weight, out)
    narrow = row * IN + m[:, None] * IN + i[None, :]
    narrow_mask = valid & (i < IN)[None, :]
    if SHORTCUT:
        out += tl.load(shortcut + narrow, mask=narrow_mask, other=0.0).to(tl.float32)
    tl.store(dx + narrow, round_to(out, dtype), mask=narrow_mask)


@CachedLaunches
@triton.jit(do_not_specialize=["M", "H_units", "IN_units", "rows_per_program"])
def weight_gradient_kernel(
    grad, y, stats, coefficients, x, w_partial, M, H_units, IN_units, rows_per_program,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, IN_TILES: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """w_partial[program] = dy^T @ x: the other half of `input_gradient_kernel`; a program holds BH of H, all of IN."""
    H = H_units * ALIGN
    IN = IN_units * ALIGN
    tiles_h = tl.cdiv(H, BH)
    program = tl.program_id(0) // tiles_h
    h = (tl.program_id(0) % tiles_h) * BH + tl.arange(0, BH)
    i = tl.arange(0, BI)
    m = tl.arange(0, BM)
    inside = h < H
    dtype: tl.constexpr = x.dtype.element_ty
    a = tl.load(coefficients + h, mask=inside, other=0.0)[None, :]
    b = tl.load(coefficients + H + h, mask=inside, other=0.0)[None, :]
    c = tl.load(coefficients + 2 * H + h, mask=inside, other=0.0)[None, :]
    scale = a
    shift = b
    if ACTIVATION is not None:
        scale = tl.load(stats + h, mask=inside, other=0.0)[None, :]
        shift = tl.load(stats + H + h, mask=inside, other=0.0)[None, :]
    w_grads = ()
    for t in tl.static_range(IN_TILES):
        w_grads = w_grads + (tl.zeros((BH, BI), tl.float32),)
    start = program * rows_per_program
    stop = tl.minimum(start + rows_per_program, M)
    for m0 in range(start, stop, BM):
        valid = (m0 + m < stop)[:, None]
        row = int64(m0)
        wide = row * H + m[:, None] * H + h[None, :]
        g = tl.load(grad + wide, mask=valid & inside[None, :], other=0.0).to(tl.float32)
        v = tl.load(y + wide, mask=valid & inside[None, :], other=0.0).to(tl.float32)
        dy = round_to(bn_backward(g, v, a, b, c, scale, shift, ACTIVATION), dtype)
        new_grads = ()
        for t in tl.static_range(IN_TILES):
            channel = t * BI + i
            narrow = row * IN + m[:, None] * IN + channel[None, :]
            inputs = tl.load(x + narrow, mask=valid & (channel < IN)[None, :], other=0.0)
            new_grads = new_grads + (dot(tl.trans(dy), inputs, w_grads[t]),)
        w_grads = new_grads
    for t in tl.static_range(IN_TILES):
        channel = t * BI + i
        at = w_partial + program.to(tl.int64) * H * IN + h[:, None] * IN + channel[None, :]
        tl.store(at, w_grads[t], mask=inside[:, None] & (channel < IN)[None, :])


def expand_backward(
    grad: Tensor, y: Tensor, stats: Tensor, coefficients: Tensor, weight: Tensor, x: Tensor, dx: Tensor, *,
    shortcut: Tensor | None, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """grad, y [M, H], weight [H.., IN..], x, dx, shortcut [M, IN] -> weight gradients [P, H, IN]; writes dx.

    grad is the gradient at the batch norm of y, or at the activation after it where there is one.
    """
    config = None if activation else expand_backward_config(y, y.shape[1], x.shape[1])
    if config is not None:
        return expand_backward_fused(grad, y, coefficients, weight, x, dx, shortcut, config)
    input_gradient(grad, y, stats, coefficients, weight, dx, shortcut=shortcut, activation=activation)
    return weight_gradient(grad, y, stats, coefficients, x, activation=activation)


def expand_backward_fused(
    grad: Tensor, y: Tensor, coefficients: Tensor, weight: Tensor, x: Tensor, dx: Tensor, shortcut: Tensor | None,
    config: PointwiseConfig,
) -> Tensor:  # fmt: skip
    rows, hidden = y.shape
    inputs = x.shape[1]
    align = alignment(hidden, inputs, weight.stride(0))
    per_program, programs = split_rows(rows, config.block_m, config.waves * multiprocessors(x.device))
    w_partial = torch.empty((programs, hidden, inputs), device=x.device, dtype=torch.float32)
    expand_backward_kernel[(programs,)](
        grad, y, coefficients, weight, x, shortcut, dx, w_partial,
        rows, hidden // align, inputs // align, weight.stride(0) // align, per_program,
        ALIGN=align, SHORTCUT=shortcut is not None, H_TILES=cdiv(hidden, config.block_k),
        BM=config.block_m, BH=config.block_k, BI=config.block_n, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return w_partial


def input_gradient(
    grad: Tensor, y: Tensor, stats: Tensor, coefficients: Tensor, weight: Tensor, dx: Tensor, *,
    shortcut: Tensor | None, activation: str | None, config: PointwiseConfig | None = None,
) -> None:  # fmt: skip
    rows, hidden = y.shape
    inputs = dx.shape[1]
    align = alignment(hidden, inputs, weight.stride(0))
    config = config or input_gradient_config(y, hidden, inputs)
    input_gradient_kernel[(cdiv(rows, config.block_m) * cdiv(inputs, config.block_n),)](
        grad, y, stats, coefficients, weight, shortcut, dx,
        rows, hidden // align, inputs // align, weight.stride(0) // align,
        ALIGN=align, ACTIVATION=activation, SHORTCUT=shortcut is not None,
        BM=config.block_m, BI=config.block_n, BH=config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def weight_gradient(
    grad: Tensor, y: Tensor, stats: Tensor, coefficients: Tensor, x: Tensor, *, activation: str | None,
    config: PointwiseConfig | None = None,
) -> Tensor:  # fmt: skip
    rows, hidden = y.shape
    inputs = x.shape[1]
    align = alignment(hidden, inputs)
    config = config or weight_gradient_config(y, hidden, inputs)
    tiles_h = cdiv(hidden, config.block_n)
    per_program, programs = split_rows(
        rows, config.block_m, max(1, config.waves * multiprocessors(x.device) // tiles_h)
    )
    w_partial = torch.empty((programs, hidden, inputs), device=x.device, dtype=torch.float32)
    weight_gradient_kernel[(programs * tiles_h,)](
        grad, y, stats, coefficients, x, w_partial,
        rows, hidden // align, inputs // align, per_program,
        ALIGN=align, ACTIVATION=activation, IN_TILES=cdiv(inputs, config.block_k),
        BM=config.block_m, BH=config.block_n, BI=config.block_k, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return w_partial
