"""What the Triton kernels share: rounding, activations, the matrix product, and per-channel statistics of a tile.

Activations are channels_last, seen as matrices [M, C] with M = N * H * W. A kernel gets channel counts in units of
ALIGN channels: a count it multiplies by 8 itself is known to be divisible by 8, so masked rows still load 16 bytes at
a time (Triton specialises integers on divisibility by 16 only, and widths of 24, 40, 56, 72 are common here). Loads
need to know nothing else of an integer, so none is specialised: imagenet's preset at 64 images takes 111 compiled
kernels that train, where it took 293.

Per-channel buffers, float32:
  stats [4, C]       scale, shift, mean, rstd of a batch normalisation: bn(y) = scale * y + shift
  coefficients [3, C]  a, b, c of its backward: dL/dy = a * dL/dbn + b * y + c
  partial [P, 2, C]  of P programs: (mean, sum of squared deviations) forward, (sum, weighted sum) backward
"""

import math
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def alignment(*channels: int) -> int:
    """Channels that every width is a multiple of: 8, or 4, 2 or 1 where some width is no multiple of 8."""
    return math.gcd(8, *channels)


def next_power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Float32 to dtype, to nearest even. The interpreter truncates to bfloat16, so it is rounded by hand there."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def int64(index):
    """A loop counter, which is a plain int in the interpreter, for offsets that may pass 2^31."""
    return index + tl.full((), 0, tl.int64)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """relu6 or relu. NaN stays NaN, as in torch: a broken step must not look like a healthy one."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "relu6":
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def lets_through(u, ACTIVATION: tl.constexpr):
    """Where a gradient passes the activation of u; u may be the activation itself."""
    inside = u > 0.0
    if ACTIVATION == "relu6":
        inside = inside & (u < 6.0)
    return inside


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 accumulation. The interpreter's bfloat16 product is wrong, so it gets float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def merge_tile(count, mean, m2, tile, valid, rows):
    """Chan's update of (count, mean[C], m2[C]) by a tile [R, C] of which `rows` rows are valid.

    The tile's own mean is taken first, so nothing cancels however large the mean is against the spread.
    """
    tile_mean = tl.sum(tl.where(valid, tile, 0.0), 0) / rows
    deviation = tl.where(valid, tile - tile_mean[None, :], 0.0)
    delta = tile_mean - mean
    share = rows / (count + rows)
    mean += delta * share
    m2 += tl.sum(deviation * deviation, 0) + delta * delta * (count * share)
    return count + rows, mean, m2


@triton.jit
def bn_backward(grad, y, a, b, c, scale, shift, ACTIVATION: tl.constexpr):
    """Gradient at a raw convolution output y from the one at its batch norm, or at the activation after it."""
    if ACTIVATION is not None:
        grad = tl.where(lets_through(scale * y + shift, ACTIVATION), grad, 0.0)
    return a * grad + b * y + c
