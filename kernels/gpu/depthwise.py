# ruff: noqa: RUF005, B007  (Triton grows tuples by +, and its unrolled loops need a counter)
"""Depthwise convolution, k 3, 5, 7, stride 1 and 2: bound by instruction issue unless every load is used many times.

A thread owns a vertical strip, some columns of one image and one or two channels, and slides down it. One input row at
a time is loaded, normalised and added into the k (stride 1) output rows it touches, which wait in registers; the
topmost is then complete, is written, and the others move up. No pixel is loaded twice vertically, horizontally only the
k - 1 columns between strips; strips of seven columns divide the maps of 224x224 images (112 ... 7) without a rest.

SASS instructions per output, sm_90, bf16, forward: k3 34, k5 54, k7 95, where 4x4 output tiles took 42, 76, 125.
On an H100 (256 images, 112x112, stride 2, 96 channels) the forward kernel takes 314 us for k3 and 320 for k5 where the
bytes take 257; before rows were prefetched it took 362 and 497.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bsnas.kernels.gpu.configs import DepthwiseConfig, depthwise_backward_config, depthwise_config
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.gpu.support import activate, alignment, cdiv, lets_through, round_to

# ---- forward


@triton.jit
def _load_rows(
    x_strip, first_row, alive, ix0, H, W, C,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS rows of COLUMNS columns, raw; columns LEFT ... RIGHT are inside any image whose width strips divide."""
    values = ()
    for s in tl.static_range(ROWS):
        iy = first_row + s
        mask = alive & ((iy >= 0) & (iy < H))
        for column in tl.static_range(COLUMNS):
            inside = mask
            if not EVEN or column < LEFT or column > RIGHT:
                ix = ix0 + column
                inside = mask & ((ix >= 0) & (ix < W))[:, None]
            values = values + (tl.load(x_strip + (iy * W + column) * C, mask=inside, other=0.0),)
    return values


@triton.jit
def _normalised_row(
    raw, row, alive, ix0, row_ok, W, scale, shift,
    COLUMNS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, EVEN: tl.constexpr, CHECK_ROW: tl.constexpr,
    PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Row `row` of raw values as float32: act(scale * x + shift), and zero, not act(shift), outside the image."""
    values = ()
    for column in tl.static_range(COLUMNS):
        value = raw[row * COLUMNS + column].to(tl.float32)
        if PROLOGUE:
            value = activate(value * scale + shift, ACTIVATION)
            if not EVEN or column < LEFT or column > RIGHT:
                ix = ix0 + column
                value = tl.where(row_ok & ((ix >= 0) & (ix < W))[:, None], value, 0.0)
            elif CHECK_ROW:
                value = tl.where(row_ok, value, 0.0)
        values = values + (value,)
    return values


@CachedLaunches
@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "C_units", "images_per_segment"])
def depthwise_forward_kernel(
    x, stats, w, out_scale, out_shift, y, partial, counts, N, H, W, HO, WO, C_units, images_per_segment,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr,
    PROLOGUE: tl.constexpr, STATISTICS: tl.constexpr, EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    TW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """x [N, H, W, C], w [KERNEL * KERNEL, C] float32 -> y [N, HO, WO, C]; zero padding comes after the prologue.

    In evaluation EPILOGUE: y = act(out_scale[s] * conv + out_shift[s]) for the segment s of an image, [S, C].
    """
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
    scale = tl.full((1, BC), 1.0, tl.float32)
    shift = scale
    if PROLOGUE:
        scale = tl.load(stats + c, mask=c < C, other=0.0)[None, :]
        shift = tl.load(stats + C + c, mask=c < C, other=0.0)[None, :]
    if EPILOGUE:
        at = (image // images_per_segment)[:, None] * C + c[None, :]
        final_scale = tl.full((1, BC), 1.0, tl.float32)
        if out_scale is not None:
            final_scale = tl.load(out_scale + at, mask=alive, other=0.0)
        final_shift = tl.load(out_shift + at, mask=alive, other=0.0)
    weights = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(w + tap * C + c, mask=c < C, other=0.0)[None, :],)
    ring = ()
    for slot in tl.static_range(DEPTH * TW):
        ring = ring + (tl.zeros((BT, BC), tl.float32),)
    columns = tl.minimum(TW, WO - ox0)[:, None].to(tl.float32)
    mean = tl.zeros((BT, BC), tl.float32)
    m2 = tl.zeros((BT, BC), tl.float32)
    LEFT: tl.constexpr = PAD
    RIGHT: tl.constexpr = PAD + (TW - 1) * STRIDE
    last = (H - 1 + PAD) // STRIDE  # slot d holds output row it - d; ends with rows last - DEPTH + 2 ... unwritten
    begin = PAD // STRIDE
    # The next rows are loaded before this one's arithmetic: registers allow few warps, which alone hide no latency.
    raw = _load_rows(x_strip, begin * STRIDE - PAD, alive, ix0, H, W, C, STRIDE, COLUMNS, LEFT, RIGHT, EVEN)
    for it in range(begin, last + DEPTH):
        if it <= last:
            current = raw
            raw = _load_rows(x_strip, (it + 1) * STRIDE - PAD, alive, ix0, H, W, C, STRIDE, COLUMNS, LEFT, RIGHT, EVEN)
            for s in tl.static_range(STRIDE):
                iy = it * STRIDE + s - PAD
                # stride 1 visits rows of the image only
                values = _normalised_row(
                    current, s, alive, ix0, (iy >= 0) & (iy < H), W, scale, shift,
                    COLUMNS, LEFT, RIGHT, EVEN, STRIDE > 1, PROLOGUE, ACTIVATION,
                )  # fmt: skip
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
                if EPILOGUE:
                    value = value * final_scale + final_shift
                    if ACTIVATION is not None:
                        value = activate(value, ACTIVATION)
                mask = alive
                if not EVEN:
                    mask = mask & (ox0 + j < WO)[:, None]
                tl.store(y_strip + (oy * WO + j) * C, round_to(value, y.dtype.element_ty), mask=mask)
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
    activation: str | None, epilogue: tuple[Tensor | None, Tensor] | None = None,
    config: DepthwiseConfig | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """x [N, H, W, C], taps [k * k, C] float32, y [N, HO, WO, C] -> partial statistics of y, if asked for.

    The activation follows the norm of x, or in evaluation `epilogue` (scale or None, shift), each [S, C] float32.
    """
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
        x, stats, taps, *(epilogue or (None, None)), y, partial, counts,
        images, height, width, out_height, out_width, channels // align,
        images if epilogue is None else images // epilogue[1].shape[0],
        ALIGN=align, KERNEL=kernel, STRIDE=stride, EVEN=out_width % config.columns == 0,
        PROLOGUE=stats is not None, STATISTICS=statistics, EPILOGUE=epilogue is not None, ACTIVATION=activation,
        TW=config.columns, BT=config.strips, BC=config.channels,
        num_warps=config.warps, maxnreg=config.registers,
    )  # fmt: skip
    return None if partial is None or counts is None else (partial, counts)


# ---- backward: input and weight gradient in one pass, both from the same window of the output's gradient


@triton.jit
def _finish_row(
    gradients, activations, x_row, dx_row, mean, offset, tiny, reread, sums, weighted, alive, px0, W, C,
    FIRST: tl.constexpr, EVEN: tl.constexpr, PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """Mask a completed row by the activation's slope, write it, and add it to the sums for the norm before.

    The second sum, of dx * (x - mean), is taken as dx * (activation - offset) and divided by scale at the end, since
    scale * x + shift is the activation wherever dx is not masked; with `reread`, x itself is read for `tiny` channels.
    """
    for j in tl.static_range(TW):
        mask = alive
        if not EVEN:
            mask = mask & (px0 + j < W)[:, None]
        gradient = gradients[FIRST * TW + j]
        if PROLOGUE:
            activation = activations[FIRST * TW + j]
            gradient = tl.where(lets_through(activation, ACTIVATION), gradient, 0.0)
            sums += gradient
            weighted += gradient * (activation - offset)
        tl.store(dx_row + j * C, round_to(gradient, dx_row.dtype.element_ty), mask=mask)
    if PROLOGUE:
        if reread:
            for j in tl.static_range(TW):
                mask = alive
                if not EVEN:
                    mask = mask & (px0 + j < W)[:, None]
                activation = activations[FIRST * TW + j]
                gradient = tl.where(lets_through(activation, ACTIVATION), gradients[FIRST * TW + j], 0.0)
                raw = tl.load(x_row + j * C, mask=mask, other=0.0).to(tl.float32)
                weighted += tl.where(tiny, gradient * (raw - mean - activation + offset), 0.0)
    return sums, weighted


@triton.jit
def _gradient_columns(g_strip, y_strip, q, alive, qx0, HO, WO, C, COLUMNS: tl.constexpr):
    """Row q of the gradient and of the output it belongs to, raw."""
    grads = ()
    ys = ()
    for column in tl.static_range(COLUMNS):
        qx = qx0 + column
        mask = alive & (q < HO) & ((qx >= 0) & (qx < WO))[:, None]
        at = (q * WO + column) * C
        grads = grads + (tl.load(g_strip + at, mask=mask, other=0.0),)
        ys = ys + (tl.load(y_strip + at, mask=mask, other=0.0),)
    return grads, ys


@CachedLaunches
@triton.jit(do_not_specialize=["N", "H", "W", "HO", "WO", "C_units"])
def depthwise_backward_kernel(
    grad, y, coefficients, x, stats, w, dx, partial, w_partial, N, H, W, HO, WO, C_units,
    ALIGN: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr, PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr, PREFETCH: tl.constexpr, TW: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """With dy = a * grad + b * y + c [N, HO, WO, C] and p = STRIDE * q + tap - PAD:

    dx[p] = act'(..) * sum over taps of dy[q] * w[tap]; w_partial[tap] = sum over p of act(bn(x[p])) * dy[q].
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
    bn_bias = a
    tiny = a > 0.0
    reread = False
    if PROLOGUE:
        scale = tl.load(stats + c, mask=c < C, other=1.0)[None, :]
        shift = tl.load(stats + C + c, mask=c < C, other=0.0)[None, :]
        mean = tl.load(stats + 2 * C + c, mask=c < C, other=0.0)[None, :]
        rstd = tl.load(stats + 3 * C + c, mask=c < C, other=1.0)[None, :]
        bn_bias = scale * mean + shift
        # A norm's weight (scale / rstd) near zero leaves no trace of x in the activation.
        tiny = tl.abs(scale) < 1e-3 * rstd
        reread = tl.max(tl.max(tiny.to(tl.int32), 1), 0) > 0
    weights = ()
    w_grads = ()
    for tap in tl.static_range(KERNEL * KERNEL):
        weights = weights + (tl.load(w + tap * C + c, mask=c < C, other=0.0)[None, :],)
        w_grads = w_grads + (tl.zeros((BT, BC), tl.float32),)
    gradients = ()  # slot ky * TW + j: input row STRIDE * q + ky - PAD
    for slot in tl.static_range(KERNEL * TW):
        gradients = gradients + (tl.zeros((BT, BC), tl.float32),)
    activations = ()  # the same rows; the last STRIDE of them arrive when q gets there
    for slot in tl.static_range(PAD * TW):
        activations = activations + (tl.zeros((BT, BC), tl.float32),)
    for ky in tl.static_range(PAD, KERNEL - STRIDE):
        first = _load_rows(x_strip, ky - PAD, alive, px0, H, W, C, 1, TW, 0, TW - 1, EVEN)
        activations = activations + _normalised_row(
            first,
            0,
            alive,
            px0,
            alive & (ky - PAD < H),
            W,
            scale,
            shift,
            TW,
            0,
            TW - 1,
            EVEN,
            True,
            PROLOGUE,
            ACTIVATION,
        )
    sums = tl.zeros((BT, BC), tl.float32)
    weighted = tl.zeros((BT, BC), tl.float32)
    AHEAD: tl.constexpr = KERNEL - STRIDE - PAD
    if PREFETCH:  # as forward, the next rows are loaded before this one's arithmetic
        next_x = _load_rows(x_strip, AHEAD, alive, px0, H, W, C, STRIDE, TW, 0, TW - 1, EVEN)
        next_grads, next_ys = _gradient_columns(grad_strip, y_strip, 0, alive, qx0, HO, WO, C, COLUMNS)
    for q in range((H - 1 + PAD) // STRIDE + 1):  # past HO, only to let the waiting rows out
        if PREFETCH:
            grads = next_grads
            ys = next_ys
            rows = next_x
            next_grads, next_ys = _gradient_columns(grad_strip, y_strip, q + 1, alive, qx0, HO, WO, C, COLUMNS)
            following = STRIDE * (q + 1) + AHEAD
            next_x = _load_rows(x_strip, following, alive, px0, H, W, C, STRIDE, TW, 0, TW - 1, EVEN)
        else:
            grads, ys = _gradient_columns(grad_strip, y_strip, q, alive, qx0, HO, WO, C, COLUMNS)
            rows = _load_rows(x_strip, STRIDE * q + AHEAD, alive, px0, H, W, C, STRIDE, TW, 0, TW - 1, EVEN)
        window = activations
        for s in tl.static_range(STRIDE):
            row = STRIDE * q + AHEAD + s
            window = window + _normalised_row(
                rows, s, alive, px0, alive & ((row >= 0) & (row < H)), W, scale, shift,
                TW, 0, TW - 1, EVEN, True, PROLOGUE, ACTIVATION,
            )  # fmt: skip
        filled = gradients
        if q < HO:
            dys = ()
            for column in tl.static_range(COLUMNS):
                dy = a * grads[column].to(tl.float32) + b * ys[column].to(tl.float32) + offset
                qx = qx0 + column
                dys = dys + (tl.where(((qx >= 0) & (qx < WO))[:, None], dy, 0.0),)
            sums_of_rows = ()
            new_grads = ()
            for ky in tl.static_range(KERNEL):
                for j in tl.static_range(TW):
                    total = gradients[ky * TW + j]
                    for column in tl.static_range(COLUMNS):
                        if (j + PAD - STRIDE * (column + LOW) >= 0) and (j + PAD - STRIDE * (column + LOW) < KERNEL):
                            total += dys[column] * weights[ky * KERNEL + j + PAD - STRIDE * (column + LOW)]
                    sums_of_rows = sums_of_rows + (total,)
                for kx in tl.static_range(KERNEL):
                    tap_grad = w_grads[ky * KERNEL + kx]
                    for j in tl.static_range(TW):
                        if (j + PAD - kx) % STRIDE == 0:
                            tap_grad += window[ky * TW + j] * dys[(j + PAD - kx) // STRIDE - LOW]
                    new_grads = new_grads + (tap_grad,)
            filled = sums_of_rows
            w_grads = new_grads
        for s in tl.static_range(STRIDE):
            row = STRIDE * q + s - PAD
            if (row >= 0) & (row < H):
                sums, weighted = _finish_row(
                    filled, window, x_strip + row * W * C, dx_strip + row * W * C, mean, bn_bias, tiny, reread, sums,
                    weighted, alive, px0, W, C, s, EVEN, PROLOGUE, ACTIVATION, TW,
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
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(w_partial + (group * KERNEL * KERNEL + tap) * C + c, tl.sum(w_grads[tap], 0), mask=c < C)
    if PROLOGUE:
        tl.store(partial + group * 2 * C + c, tl.sum(sums, 0), mask=c < C)
        divisor = tl.max(tl.where(tiny, 1.0, scale), 0)  # of one row: its only value
        tl.store(partial + (group * 2 + 1) * C + c, tl.sum(weighted, 0) / divisor, mask=c < C)


def depthwise_backward(
    grad: Tensor, y: Tensor, coefficients: Tensor, x: Tensor, stats: Tensor | None, taps: Tensor, dx: Tensor,
    kernel: int, stride: int, activation: str | None, config: DepthwiseConfig | None = None,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """grad, y [N, HO, WO, C], x, dx [N, H, W, C] -> partial sums [P, 2, C] of dx, taps' gradients [P, k * k, C].

    dx is the gradient at the batch norm before the convolution, which the activation follows, or at its plain input
    where stats is None.
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
        ACTIVATION=activation, PREFETCH=config.prefetch,
        TW=config.columns, BT=config.strips, BC=config.channels, num_warps=config.warps,
    )  # fmt: skip
    return partial, w_partial
