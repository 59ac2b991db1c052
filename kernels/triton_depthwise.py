"""Depthwise convolution, k 3, 5, 7, stride 1 and 2: bound by instruction issue unless every load is used many times.

A thread owns a vertical strip, some columns of one image and one or two channels, and slides down it. One input row at
a time is loaded, normalised and added into the k (stride 1) output rows it touches, which wait in registers; the
topmost is then complete, is written, and the others move up. No pixel is loaded twice vertically, horizontally only the
k - 1 columns between strips; strips of seven columns divide the maps of 224x224 images (112 ... 7) without a rest.

SASS instructions per output, sm_90, bf16, forward: k3 31, k5 48, k7 79, where 4x4 output tiles took 42, 76, 125.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configs import DepthwiseConfig, depthwise_backward_config, depthwise_config
from kernels.triton_support import alignment, cdiv, relu6, round_to

# ---- forward


@triton.jit
def depthwise_forward_kernel(
    x, stats, w, bias, y, partial, counts, N, H, W, HO, WO, C_units,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr,
    PROLOGUE: tl.constexpr, STATISTICS: tl.constexpr, BIAS_RELU6: tl.constexpr,
    TW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C], w [KERNEL * KERNEL, C] float32 -> y [N, HO, WO, C]; zero padding comes after the prologue."""
    PAD: tl.constexpr = KERNEL // 2
    DEPTH: tl.constexpr = (KERNEL - 1) // STRIDE + 1  # output rows that wait for input
    COLUMNS: tl.constexpr = (TW - 1) * STRIDE + KERNEL
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    group = tl.program_id(0) // chunks
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    strips_x = tl.cdiv(WO, TW)
    strip = group * BT + tl.arange(0, BT)
    image = strip // strips_x
    ox0 = (strip % strips_x) * TW
    ix0 = ox0 * STRIDE - PAD
    alive = (strip < N * strips_x)[:, None] & (c < C)[None, :]
    x_strip = x + ((image.to(tl.int64) * H) * W + ix0)[:, None] * C + c[None, :]
    y_strip = y + ((image.to(tl.int64) * HO) * WO + ox0)[:, None] * C + c[None, :]
    if PROLOGUE:
        scale = tl.load(stats + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(stats + C + c, mask=c < C, other=0.0)[None, :]
    if BIAS_RELU6 != 0:
        offset = tl.load(bias + c, mask=c < C, other=0.0)[None, :]
    weights = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(w + tap * C + c, mask=c < C, other=0.0)[None, :],)
    ring = ()
    for slot in tl.static_range(DEPTH * TW):
        ring = ring + (tl.zeros((BT, BC), tl.float32),)
    columns = tl.minimum(TW, WO - ox0)[:, None].to(tl.float32)
    mean = tl.zeros((BT, BC), tl.float32)
    m2 = tl.zeros((BT, BC), tl.float32)
    last = (H - 1 + PAD) // STRIDE  # slot d holds output row it - d; ends with rows last - DEPTH + 2 ... unwritten
    for it in range(PAD // STRIDE, last + DEPTH):
        if it <= last:
            for s in tl.static_range(STRIDE):
                iy = it * STRIDE + s - PAD
                row_ok = (iy >= 0) & (iy < H)
                values = ()
                for column in tl.static_range(COLUMNS):
                    inside = alive & row_ok
                    if not EVEN or column < PAD or column > PAD + (TW - 1) * STRIDE:
                        ix = ix0 + column
                        inside = inside & ((ix >= 0) & (ix < W))[:, None]
                    value = tl.load(x_strip + (iy * W + column) * C, mask=inside, other=0.0).to(tl.float32)
                    if PROLOGUE:
                        value = relu6(value * scale + shift)
                        if not EVEN or column < PAD or column > PAD + (TW - 1) * STRIDE:
                            value = tl.where(inside, value, 0.0)
                        elif STRIDE > 1:  # stride 1 visits rows of the image only
                            value = tl.where(row_ok, value, 0.0)
                    values = values + (value,)
                filled = ()
                for d in tl.static_range(DEPTH):
                    for j in tl.static_range(TW):
                        total = ring[d * TW + j]
                        if d * STRIDE + s < KERNEL:
                            for kx in tl.static_range(KERNEL):
                                total += values[j * STRIDE + kx] * weights[(d * STRIDE + s) * KERNEL + kx]
                        filled = filled + (total,)
                ring = filled
        oy = it - (DEPTH - 1)
        if (oy >= 0) & (oy < HO):
            outputs = ()
            tile_sum = tl.zeros((BT, BC), tl.float32)
            for j in tl.static_range(TW):
                value = ring[(DEPTH - 1) * TW + j]
                if BIAS_RELU6 != 0:
                    value += offset
                if BIAS_RELU6 == 2:
                    value = relu6(value)
                value = round_to(value, y.dtype.element_ty)
                mask = alive
                if not EVEN:
                    mask = mask & (ox0 + j < WO)[:, None]
                tl.store(y_strip + (oy * WO + j) * C, value, mask=mask)
                value = value.to(tl.float32)
                if not EVEN:
                    value = tl.where((ox0 + j < WO)[:, None], value, 0.0)
                outputs = outputs + (value,)
                tile_sum += value
            if STATISTICS:  # Chan's update by this row; every strip of the program has written oy rows before
                tile_mean = tile_sum / columns
                spread = tl.zeros((BT, BC), tl.float32)
                for j in tl.static_range(TW):
                    deviation = outputs[j] - tile_mean
                    if not EVEN:
                        deviation = tl.where((ox0 + j < WO)[:, None], deviation, 0.0)
                    spread += deviation * deviation
                rows = oy * 1.0
                delta = tile_mean - mean
                mean += delta / (rows + 1.0)
                m2 += spread + delta * delta * columns * (rows / (rows + 1.0))
        moved = ()
        for slot in tl.static_range(DEPTH * TW):
            if slot < TW:
                moved = moved + (tl.zeros((BT, BC), tl.float32),)
            else:
                moved = moved + (ring[slot - TW],)
        ring = moved
    if STATISTICS:
        weight = tl.where(strip < N * strips_x, 1.0, 0.0)[:, None] * columns * HO
        count = tl.sum(weight)
        total_mean = tl.sum(mean * weight, 0) / count
        deviation = mean - total_mean[None, :]
        total_m2 = tl.sum(tl.where(weight > 0.0, m2, 0.0) + deviation * deviation * weight, 0)
        tl.store(partial + group * 2 * C + c, total_mean, mask=c < C)
        tl.store(partial + (group * 2 + 1) * C + c, total_m2, mask=c < C)
        if tl.program_id(0) % chunks == 0:
            tl.store(counts + group, count)


def output_size(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def depthwise_forward(
    x: Tensor, taps: Tensor, y: Tensor, stats: Tensor | None, kernel: int, stride: int, *, statistics: bool,
    bias: Tensor | None = None, relu6: bool = False, config: DepthwiseConfig | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """x [N, H, W, C], taps [k * k, C] float32, y [N, HO, WO, C] -> partial statistics of y, if asked for."""
    images, height, width, channels = x.shape
    out_height, out_width = y.shape[1:3]
    align = alignment(channels)
    config = config or depthwise_config(x, kernel, stride, out_width)
    groups = cdiv(images * cdiv(out_width, config.columns), config.strips)
    partial = counts = None
    if statistics:
        partial = torch.empty((groups, 2, channels), device=x.device, dtype=torch.float32)
        counts = torch.empty((groups,), device=x.device, dtype=torch.float32)
    depthwise_forward_kernel[(groups * cdiv(channels, config.channels),)](
        x, stats, taps, bias, y, partial, counts,
        images, height, width, out_height, out_width, channels // align,
        ALIGN=align, KERNEL=kernel, STRIDE=stride, EVEN=out_width % config.columns == 0,
        PROLOGUE=stats is not None, STATISTICS=statistics, BIAS_RELU6=0 if bias is None else 1 + relu6,
        TW=config.columns, BT=config.strips, BC=config.channels, num_warps=config.warps,
    )  # fmt: skip
    return None if partial is None or counts is None else (partial, counts)


# ---- backward: input and weight gradient in one pass, both from the same window of the output's gradient


@triton.jit
def _finish_row(
    gradients, activations, x_row, dx_row, mean, sums, weighted, alive, px0, W, C,
    FIRST: tl.constexpr, EVEN: tl.constexpr, PROLOGUE: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """Mask a completed row by relu6', write it, and add it to the sums for the batch norm before the convolution."""
    for j in tl.static_range(TW):
        mask = alive
        if not EVEN:
            mask = mask & (px0 + j < W)[:, None]
        gradient = gradients[FIRST * TW + j]
        if PROLOGUE:
            activation = activations[FIRST * TW + j]
            gradient = tl.where((activation > 0.0) & (activation < 6.0), gradient, 0.0)
        rounded = round_to(gradient, dx_row.dtype.element_ty)
        tl.store(dx_row + j * C, rounded, mask=mask)
        if PROLOGUE:  # read a few rows ago: in L2, and nearer
            raw = tl.load(x_row + j * C, mask=mask, other=0.0).to(tl.float32)
            kept = rounded.to(tl.float32)
            sums += kept
            weighted += kept * (raw - mean)
    return sums, weighted


@triton.jit
def _load_row(
    x_row, scale, shift, alive, px0, row_ok, W, C, EVEN: tl.constexpr, PROLOGUE: tl.constexpr, TW: tl.constexpr
):
    """A row of the convolution's input, TW columns: relu6(scale * x + shift), zero outside the image."""
    values = ()
    for j in tl.static_range(TW):
        mask = alive & row_ok
        if not EVEN:
            mask = mask & (px0 + j < W)[:, None]
        value = tl.load(x_row + j * C, mask=mask, other=0.0).to(tl.float32)
        if PROLOGUE:
            value = tl.where(mask, relu6(value * scale + shift), 0.0)
        values = values + (value,)
    return values


@triton.jit
def depthwise_backward_kernel(
    grad, y, coefficients, x, stats, w, dx, partial, w_partial, N, H, W, HO, WO, C_units,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, PROLOGUE: tl.constexpr,
    TW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """With dy = a * grad + b * y + c [N, HO, WO, C] and p = STRIDE * q + tap - PAD:

    dx[p] = relu6'(..) * sum over taps of dy[q] * w[tap]; w_partial[tap] = sum over p of relu6(bn(x[p])) * dy[q].
    Row q of dy touches KERNEL input rows: they wait in registers (gradient and activation) and leave from the top.
    """
    PAD: tl.constexpr = KERNEL // 2
    LOW: tl.constexpr = -(PAD // STRIDE)  # columns of dy around the strip's first
    COLUMNS: tl.constexpr = (TW - 1 + PAD) // STRIDE - LOW + 1
    C = C_units * ALIGN
    chunks = tl.cdiv(C, BC)
    group = tl.program_id(0) // chunks
    c = (tl.program_id(0) % chunks) * BC + tl.arange(0, BC)
    strips_x = tl.cdiv(W, TW)
    strip = group * BT + tl.arange(0, BT)
    image = strip // strips_x
    px0 = (strip % strips_x) * TW
    qx0 = px0 // STRIDE + LOW
    alive = (strip < N * strips_x)[:, None] & (c < C)[None, :]
    x_offset = ((image.to(tl.int64) * H) * W + px0)[:, None] * C + c[None, :]
    q_offset = ((image.to(tl.int64) * HO) * WO + qx0)[:, None] * C + c[None, :]
    x_strip = x + x_offset
    dx_strip = dx + x_offset
    grad_strip = grad + q_offset
    y_strip = y + q_offset
    a = tl.load(coefficients + c, mask=c < C, other=0.0)[None, :]
    b = tl.load(coefficients + C + c, mask=c < C, other=0.0)[None, :]
    offset = tl.load(coefficients + 2 * C + c, mask=c < C, other=0.0)[None, :]
    scale = a
    shift = a
    mean = a
    if PROLOGUE:
        scale = tl.load(stats + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(stats + C + c, mask=c < C, other=0.0)[None, :]
        mean = tl.load(stats + 2 * C + c, mask=c < C, other=0.0)[None, :]
    weights = ()
    w_grads = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(w + tap * C + c, mask=c < C, other=0.0)[None, :],)
        w_grads = w_grads + (tl.zeros((BT, BC), tl.float32),)
    gradients = ()  # slot ky * TW + j: input row STRIDE * q + ky - PAD
    for slot in tl.static_range(KERNEL * TW):
        gradients = gradients + (tl.zeros((BT, BC), tl.float32),)
    activations = ()  # the same rows; the last STRIDE of them are loaded when q gets there
    for ky in tl.static_range(KERNEL - STRIDE):
        if ky < PAD:
            for j in tl.static_range(TW):
                activations = activations + (tl.zeros((BT, BC), tl.float32),)
        else:
            row = ky - PAD
            activations = activations + _load_row(
                x_strip + row * W * C, scale, shift, alive, px0, row < H, W, C, EVEN, PROLOGUE, TW
            )
    sums = tl.zeros((BT, BC), tl.float32)
    weighted = tl.zeros((BT, BC), tl.float32)
    for q in range(0, HO):
        window = activations
        for s in tl.static_range(STRIDE):
            row = STRIDE * q + KERNEL - STRIDE + s - PAD
            window = window + _load_row(
                x_strip + row * W * C, scale, shift, alive, px0, (row >= 0) & (row < H), W, C, EVEN, PROLOGUE, TW
            )
        dys = ()
        for column in tl.static_range(COLUMNS):
            qx = qx0 + column
            mask = alive & ((qx >= 0) & (qx < WO))[:, None]
            at = (q * WO + column) * C
            g = tl.load(grad_strip + at, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(y_strip + at, mask=mask, other=0.0).to(tl.float32)
            dys = dys + (tl.where(mask, a * g + b * v + offset, 0.0),)
        filled = ()
        new_grads = ()
        for ky in tl.static_range(KERNEL):
            for j in tl.static_range(TW):
                total = gradients[ky * TW + j]
                for column in tl.static_range(COLUMNS):
                    if (j + PAD - STRIDE * (column + LOW) >= 0) and (j + PAD - STRIDE * (column + LOW) < KERNEL):
                        total += dys[column] * weights[ky * KERNEL + j + PAD - STRIDE * (column + LOW)]
                filled = filled + (total,)
            for kx in tl.static_range(KERNEL):
                tap_grad = w_grads[ky * KERNEL + kx]
                for j in tl.static_range(TW):
                    if (j + PAD - kx) % STRIDE == 0:
                        tap_grad += window[ky * TW + j] * dys[(j + PAD - kx) // STRIDE - LOW]
                new_grads = new_grads + (tap_grad,)
        w_grads = new_grads
        for s in tl.static_range(STRIDE):
            row = STRIDE * q + s - PAD
            if (row >= 0) & (row < H):
                sums, weighted = _finish_row(
                    filled, window, x_strip + row * W * C, dx_strip + row * W * C, mean, sums, weighted, alive,
                    px0, W, C, s, EVEN, PROLOGUE, TW,
                )  # fmt: skip
        moved = ()
        kept = ()
        for slot in tl.static_range(KERNEL * TW):
            if slot + STRIDE * TW < KERNEL * TW:
                moved = moved + (filled[slot + STRIDE * TW],)
                kept = kept + (window[slot + STRIDE * TW],)
            else:
                moved = moved + (tl.zeros((BT, BC), tl.float32),)
        gradients = moved
        activations = kept
    for ky in tl.static_range(KERNEL - STRIDE):  # rows below the last output row's topmost
        row = STRIDE * HO + ky - PAD
        if (row >= 0) & (row < H):
            sums, weighted = _finish_row(
                gradients, activations, x_strip + row * W * C, dx_strip + row * W * C, mean, sums, weighted, alive,
                px0, W, C, ky, EVEN, PROLOGUE, TW,
            )  # fmt: skip
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(w_partial + (group * KERNEL * KERNEL + tap) * C + c, tl.sum(w_grads[tap], 0), mask=c < C)
    if PROLOGUE:
        tl.store(partial + group * 2 * C + c, tl.sum(sums, 0), mask=c < C)
        tl.store(partial + (group * 2 + 1) * C + c, tl.sum(weighted, 0), mask=c < C)


def depthwise_backward(
    grad: Tensor, y: Tensor, coefficients: Tensor, x: Tensor, stats: Tensor | None, taps: Tensor, dx: Tensor,
    kernel: int, stride: int, config: DepthwiseConfig | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """grad, y [N, HO, WO, C], x, dx [N, H, W, C] -> partial sums [P, 2, C] of dx (with stats), taps' gradients [P, k * k, C].

    dx is the gradient at the batch norm before the convolution, or at its plain input where stats is None.
    """
    images, height, width, channels = x.shape
    out_height, out_width = y.shape[1:3]
    align = alignment(channels)
    config = config or depthwise_backward_config(x, kernel, stride)
    groups = cdiv(images * cdiv(width, config.columns), config.strips)
    partial = None
    if stats is not None:
        partial = torch.empty((groups, 2, channels), device=x.device, dtype=torch.float32)
    w_partial = torch.empty((groups, kernel * kernel, channels), device=x.device, dtype=torch.float32)
    depthwise_backward_kernel[(groups * cdiv(channels, config.channels),)](
        grad, y, coefficients, x, stats, taps, dx, partial, w_partial,
        images, height, width, out_height, out_width, channels // align,
        ALIGN=align, KERNEL=kernel, STRIDE=stride, EVEN=width % config.columns == 0, PROLOGUE=stats is not None,
        TW=config.columns, BT=config.strips, BC=config.channels, num_warps=config.warps,
    )  # fmt: skip
    return partial, w_partial
