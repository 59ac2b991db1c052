"""Every Triton kernel against float64: on a GPU where there is one, else under Triton's interpreter.

The interpreter has to be chosen before Triton is imported, so without a GPU these tests skip unless TRITON_INTERPRET=1;
test_interpreter.py runs them so, in a process of its own. Outputs are poisoned with NaN before each launch.
"""

import gc
import os
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

pytest.importorskip("triton")
GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not GPU and not INTERPRETED:
    pytest.skip("needs an NVIDIA GPU or TRITON_INTERPRET=1 (test_interpreter.py)", allow_module_level=True)

from bsnas.kernels import BlockShape, BlockWeights, graphs, inverted_residual, pointwise_bn_act, reference
from bsnas.kernels.gpu import batch_norm
from bsnas.kernels.gpu.configs import DepthwiseConfig, PointwiseConfig
from bsnas.kernels.gpu.depthwise import depthwise_backward, depthwise_forward, output_size
from bsnas.kernels.gpu.inference import Triton
from bsnas.kernels.gpu.pointwise import (
    expand_backward_fused,
    input_gradient,
    pointwise_forward,
    project_backward,
    weight_gradient,
)
from bsnas.kernels.gpu.weights import prepare_weights, reduce_gradients
from bsnas.kernels.inference import Reference
from bsnas.kernels.plan import activate
from tests.kernels.tolerances import TOLERANCE, error

DEVICE = "cuda" if GPU and not INTERPRETED else "cpu"
LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: what a kernel does not write shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


def random(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size).to(device=DEVICE, dtype=dtype)


def statistics_of(channels: int) -> Tensor:
    """A plausible [4, C]: scale, shift, mean, rstd, with activations on both sides of 0 and 6."""
    stats = torch.randn(4, channels)
    stats[0] = stats[0].abs() + 1.0
    stats[1] += 1.5
    stats[3] = stats[3].abs() + 0.5
    return stats.to(DEVICE)


def check(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == expected.shape
    assert error(out, expected) <= TOLERANCE[dtype], error(out, expected)


def batch_statistics(partials: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Mean and variance that `finalize` makes of partials, seen through the running statistics at momentum 1."""
    channels = partials[0].shape[2]
    mean, var = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
    batches = torch.zeros((), dtype=torch.int64, device=DEVICE)
    ones, zeros = torch.ones(channels, device=DEVICE), torch.zeros(channels, device=DEVICE)
    batch_norm.finalize(partials, (ones, zeros), (mean, var, batches), rows, 1.0, 1e-5)
    return mean, var * (rows - 1) / rows


# ---- pointwise


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "inner", "outer"), [(150, 24, 40), (64, 72, 24), (37, 17, 33)])
@pytest.mark.parametrize("prologue", [False, True])
def test_pointwise_forward(dtype: torch.dtype, rows: int, inner: int, outer: int, prologue: bool) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(outer + 8, inner + 8, dtype=dtype)
    stats = statistics_of(inner) if prologue else None
    y = torch.empty((rows, outer), dtype=dtype, device=DEVICE)
    partials = pointwise_forward(
        x, weight, y, stats, statistics=True, activation="relu6", config=PointwiseConfig(32, 32, 32, 4, 2, 2)
    )
    a = x.double()
    if stats is not None:
        a = (a * stats[0].double() + stats[1].double()).clamp(0, 6)
    expected = a @ weight[:outer, :inner].double().T
    check(y, expected, dtype)
    assert partials is not None
    mean, var = batch_statistics(partials, rows)
    check(mean, y.double().mean(0), torch.float32)
    check(var, y.double().var(0, unbiased=False), torch.float32)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "hidden", "out"), [(150, 72, 24), (70, 168, 40), (37, 33, 17)])
def test_project_backward(dtype: torch.dtype, rows: int, hidden: int, out: int) -> None:
    grad, y3, y2 = random(rows, out, dtype=dtype), random(rows, out, dtype=dtype), random(rows, hidden, dtype=dtype)
    weight, coefficients, stats = random(out + 8, hidden + 8, dtype=dtype), random(3, out), statistics_of(hidden)
    dz2 = torch.empty((rows, hidden), dtype=dtype, device=DEVICE)
    partial, w_partial = project_backward(
        grad, y3, coefficients, weight, y2, stats, dz2, activation="relu6", config=PointwiseConfig(32, 32, 16, 4, 1, 2)
    )
    a, b, c = coefficients.double()
    dy3 = a * grad.double() + b * y3.double() + c
    u = y2.double() * stats[0].double() + stats[1].double()
    expected = (dy3 @ weight[:out, :hidden].double()) * ((u > 0) & (u < 6))
    check(dz2, expected, dtype)
    check(w_partial.sum(0), dy3.T @ u.clamp(0, 6), dtype)
    check(partial[:, 0].sum(0), dz2.double().sum(0), torch.float32)
    check(partial[:, 1].sum(0), (dz2.double() * (y2.double() - stats[2].double())).sum(0), torch.float32)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("rows", "hidden", "inputs"), [(150, 72, 24), (70, 96, 40), (37, 33, 17)])
@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_expand_backward(dtype: torch.dtype, rows: int, hidden: int, inputs: int, shortcut: bool, fused: bool) -> None:
    grad, y1, x = (
        random(rows, hidden, dtype=dtype),
        random(rows, hidden, dtype=dtype),
        random(rows, inputs, dtype=dtype),
    )
    weight, coefficients, stats = random(hidden + 8, inputs + 8, dtype=dtype), random(3, hidden), statistics_of(hidden)
    add = random(rows, inputs, dtype=dtype) if shortcut else None
    dx = torch.empty_like(x)
    activation = None if fused else "relu6"  # the two kernels also serve the tail, whose gradient ReLU6 masks
    if fused:
        config = PointwiseConfig(32, 64, 32, 4, 1, 2)
        w_partial = expand_backward_fused(grad, y1, coefficients, weight, x, dx, add, config)
    else:
        config = PointwiseConfig(32, 32, 32, 4, 1, 2)
        input_gradient(grad, y1, stats, coefficients, weight, dx, shortcut=add, activation=activation, config=config)
        w_partial = weight_gradient(grad, y1, stats, coefficients, x, activation=activation, config=config)
    a, b, c = coefficients.double()
    u = y1.double() * stats[0].double() + stats[1].double()
    masked = grad.double() * ((u > 0) & (u < 6)) if activation else grad.double()
    dy1 = a * masked + b * y1.double() + c
    check(dx, dy1 @ weight[:hidden, :inputs].double() + (0 if add is None else add.double()), dtype)
    check(w_partial.sum(0), dy1.T @ x.double(), dtype)


# ---- depthwise


def depthwise_reference(x: Tensor, stats: Tensor | None, taps: Tensor, kernel: int, stride: int) -> Tensor:
    """All NHWC, float64."""
    a = x if stats is None else (x * stats[0] + stats[1]).clamp(0, 6)
    weight = taps.T.reshape(-1, 1, kernel, kernel)
    a = a.permute(0, 3, 1, 2)
    out = F.conv2d(a, weight, stride=stride, padding=kernel // 2, groups=a.shape[1])
    return out.permute(0, 2, 3, 1)


DEPTHWISE = [*product((3, 5, 7), (1, 2), [(7, 7)], [torch.float32]), (5, 1, (6, 9), torch.float32),
             (7, 2, (9, 6), torch.float32), (3, 2, (5, 8), torch.bfloat16), (5, 1, (4, 14), torch.float16),
             (3, 1, (1, 1), torch.float32), (7, 2, (2, 3), torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("kernel", "stride", "size", "dtype"), DEPTHWISE)
@pytest.mark.parametrize("prologue", [False, True])
def test_depthwise(kernel: int, stride: int, size: tuple[int, int], dtype: torch.dtype, prologue: bool) -> None:
    images, channels = 3, 20
    height, width = size
    out = (images, output_size(height, stride), output_size(width, stride), channels)
    x, taps = random(images, height, width, channels, dtype=dtype), random(kernel**2, channels)
    stats = statistics_of(channels) if prologue else None
    if stats is not None and kernel == 3:
        stats[0, 4] = 0.0  # a norm whose weight is zero
    y = torch.empty(out, dtype=dtype, device=DEVICE)
    columns = 7 if width % 7 == 0 and stride == 1 else 4
    config = DepthwiseConfig(columns, 4, 32, 4)
    partials = depthwise_forward(x, taps, y, stats, kernel, stride, statistics=True, activation="relu6", config=config)
    x64 = x.double().requires_grad_()
    taps64 = taps.double().requires_grad_()
    stats64 = None if stats is None else stats.double()
    expected = depthwise_reference(x64, stats64, taps64, kernel, stride)
    check(y, expected.detach(), dtype)
    assert partials is not None
    mean, var = batch_statistics(partials, y.numel() // channels)
    flat = expected.detach().reshape(-1, channels)  # statistics are of the unrounded output
    check(mean, flat.mean(0), torch.float32)
    if flat.shape[0] > 3:
        check(var, flat.var(0, unbiased=False), torch.float32)

    grad, coefficients, dx = random(*out, dtype=dtype), random(3, channels), torch.empty_like(x)
    partial, w_partial = depthwise_backward(
        grad, y, coefficients, x, stats, taps, dx, kernel, stride, "relu6", config._replace(columns=4)
    )
    a, b, c = coefficients.double()
    expected.backward(a * grad.double() + b * y.double() + c)
    assert x64.grad is not None
    assert taps64.grad is not None
    expected_dx = x64.grad
    if stats64 is not None:  # at the norm's output, not at x
        u = (x.double() * stats64[0] + stats64[1]).requires_grad_()
        depthwise_reference(u.clamp(0, 6), None, taps.double(), kernel, stride).backward(
            a * grad.double() + b * y.double() + c
        )
        expected_dx = u.grad
    check(dx, expected_dx, dtype)
    check(w_partial.sum(0), taps64.grad, torch.float32)
    if stats64 is not None:
        assert partial is not None
        dx64 = expected_dx
        check(partial[:, 0].sum(0), dx64.sum((0, 1, 2)), torch.float32)
        check(partial[:, 1].sum(0), (dx64 * (x.double() - stats64[2])).sum((0, 1, 2)), torch.float32)


# ---- statistics


@pytest.mark.parametrize("ratio", [1.0, 300.0])
def test_statistics_of_a_large_mean(ratio: float) -> None:
    """A mean of 300 spreads: sums of squares in float32 would keep two digits of the variance."""
    y = random(333, 24) + ratio
    mean, var = batch_statistics(batch_norm.statistics(y), 333)
    check(mean, y.double().mean(0), torch.float32)
    check(var, y.double().var(0, unbiased=False), torch.float32)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_follow_batch_norm(momentum: float | None) -> None:
    ours, theirs = (nn.BatchNorm2d(24, momentum=momentum).to(DEVICE) for _ in range(2))
    for _ in range(3):
        x = random(4, 24, 5, 5) * 3 + 2
        y = x.permute(0, 2, 3, 1).reshape(-1, 24).contiguous()
        running = (ours.running_mean, ours.running_var, ours.num_batches_tracked)
        stats = batch_norm.finalize(
            batch_norm.statistics(y), (ours.weight, ours.bias), running, y.shape[0], momentum, ours.eps
        )
        z = torch.empty_like(y)
        batch_norm.apply(y, stats, z)
        check(z, theirs(x).permute(0, 2, 3, 1).reshape(-1, 24).detach(), torch.float32)
    check(ours.running_mean, theirs.running_mean, torch.float32)
    check(ours.running_var, theirs.running_var, torch.float32)
    assert int(ours.num_batches_tracked) == int(theirs.num_batches_tracked) == 3


def test_nan_stays_nan() -> None:
    x = random(40, 16)
    x[3, 5] = float("nan")
    z = torch.empty_like(x)
    batch_norm.apply(x, statistics_of(16), z, activation="relu6")
    assert z.isnan().sum() == 1


# ---- weights


def test_weights_are_slices_and_centre_crops() -> None:
    weights = BlockWeights(random(56, 24), random(56, 1, 7, 7), random(40, 56))
    shape = BlockShape(16, 48, 32, 5, 1)
    expand, taps, project = prepare_weights(weights, shape, torch.bfloat16)
    assert expand is not None
    assert torch.equal(expand, weights.expand[:48, :16].bfloat16())
    assert torch.equal(project, weights.project[:32, :48].bfloat16())
    assert torch.equal(taps, weights.depthwise[:48, 0, 1:6, 1:6].reshape(48, 25).T)

    partials = random(5, 48, 16), random(3, 25, 48), random(4, 32, 48)
    full = reduce_gradients(*partials, weights, shape)
    expected = [torch.zeros_like(w, dtype=torch.float64) for w in weights]
    expected[0][:48, :16] = partials[0].double().sum(0)
    expected[1][:48, 0, 1:6, 1:6] = partials[1].double().sum(0).T.reshape(48, 5, 5)
    expected[2][:32, :48] = partials[2].double().sum(0)
    for out, want in zip(full, expected, strict=True):
        check(out, want, torch.float32)
        assert torch.equal(out == 0, want == 0)


# ---- evaluation


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("segments", [0, 1, 3])
def test_inference(dtype: torch.dtype, segments: int) -> None:
    """Folded (0) and segmented convolutions against the reference backend of bsnas.kernels.inference in float64."""
    x, weight, residual = (
        random(6, 24, 5, 7, dtype=dtype),
        random(40, 24, dtype=dtype),
        random(6, 40, 5, 7, dtype=dtype),
    )
    scale, shift = random(max(segments, 1), 40), random(max(segments, 1), 40)
    taps, scale_in, shift_in = (
        random(24, 1, 5, 5, dtype=dtype),
        random(max(segments, 1), 24),
        random(max(segments, 1), 24),
    )
    found = []
    for backend, kind in ((Reference, torch.float64), (Triton, dtype)):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        for activation, add in (("relu6", None), ("relu", None), (None, residual.to(kind))):
            vectors = (scale.to(wide), shift.to(wide)) if segments else (shift[0].to(kind),)
            run = backend.segmented_pointwise if segments else backend.folded_pointwise
            found.append(run(x.to(kind), weight.to(kind), *vectors, activation=activation, residual=add))
        for stride in (1, 2):
            vectors = (scale_in.to(wide), shift_in.to(wide)) if segments else (shift_in[0].to(kind),)
            run = backend.segmented_depthwise if segments else backend.folded_depthwise
            given = taps.to(kind) if backend is Reference or stride == 2 else Triton.packed_depthwise(taps, 5, stride)
            found.append(run(x.to(kind), given, *vectors, stride=stride, activation="relu6" if stride == 1 else "relu"))
    for expected, out in zip(found[:5], found[5:], strict=True):
        check(out, expected, dtype)


# ---- the block and the tail


def norms(shape: BlockShape, dtype: torch.dtype) -> tuple[nn.BatchNorm2d, ...]:
    made = []
    spread = 1 if shape.activation == "relu6" else 4  # many values are past 6, where only ReLU6 stops
    generator = torch.Generator().manual_seed(1)
    for channels in (shape.hidden, shape.hidden, shape.out_channels):
        bn = nn.BatchNorm2d(channels)
        with torch.no_grad():
            bn.weight.copy_(spread * (1 + 0.3 * torch.randn(channels, generator=generator)))
            bn.bias.copy_(1 + torch.randn(channels, generator=generator))
            bn.running_mean.copy_(torch.randn(channels, generator=generator))
            bn.running_var.copy_(1 + torch.rand(channels, generator=generator))
        made.append(bn.to(DEVICE, dtype))
    return tuple(made)


def run_block(
    backend: str, x: Tensor, weights: list[Tensor | None], shape: BlockShape, grad: Tensor, training: bool,
    dtype: torch.dtype, first_norm: bool,
) -> dict[str, Tensor]:  # fmt: skip
    leaves = BlockWeights(*(None if w is None else w.to(dtype, copy=True).requires_grad_() for w in weights))
    bns = norms(shape, dtype)
    x = x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    taken = bns if first_norm else (None, *bns[1:])
    z = inverted_residual(x, leaves, taken, shape, training=training, backend=backend)  # type: ignore[arg-type]
    z.backward(grad.to(z.dtype))
    found = {"z": z.detach(), "dx": x.grad} | {
        f"d_{name}": w.grad for name, w in leaves._asdict().items() if w is not None
    }
    for i, bn in enumerate(taken):
        if bn is not None:
            found |= {f"d_weight{i}": bn.weight.grad, f"d_bias{i}": bn.bias.grad}
            found |= {f"mean{i}": bn.running_mean, f"var{i}": bn.running_var}
            assert int(bn.num_batches_tracked) == int(training)
    return found  # type: ignore[return-value]


def compare_block(
    shape: BlockShape, batch: int, size: tuple[int, int], dtype: torch.dtype, *, training: bool = True,
    expand: bool = True, first_norm: bool = True, k_max: int = 7,
) -> None:  # fmt: skip
    x = random(batch, shape.in_channels, *size, dtype=dtype)
    weights = [
        random(shape.hidden + 8, shape.in_channels + 8) / shape.in_channels**0.5 if expand else None,
        random(shape.hidden + 8, 1, k_max, k_max) / shape.kernel,
        random(shape.out_channels + 8, shape.hidden + 8) / shape.hidden**0.5,
    ]
    out = output_size(size[0], shape.stride), output_size(size[1], shape.stride)
    grad = random(batch, shape.out_channels, *out)
    if dtype != torch.float32:
        compare_from_stored(x, weights, shape, grad.to(dtype))
        return
    rest = (shape, grad, training)
    exact = run_block("reference", x.double(), weights, *rest, torch.float64, first_norm)
    ours = run_block("triton", x, weights, *rest, torch.float32, first_norm)
    for name, value in exact.items():
        assert error(ours[name], value) <= TOLERANCE[dtype], (name, error(ours[name], value))


def at_stored(exact: Tensor, stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The stored value, after a check that it is close to `exact`, whose gradient goes on to `exact`."""
    check(stored, exact.detach(), dtype)
    at = exact + (stored.double() - exact).detach()
    at.retain_grad()
    return at


def norm_at_stored(
    y: Tensor, bn: nn.BatchNorm2d, stats: Tensor, dtype: torch.dtype, training: bool = True
) -> Tensor:  # fmt: skip
    """bn(y) at the scale and shift that were stored: with the very masks of the activation that our kernels take."""
    scale, shift = stats[:2, None, :, None, None].double()
    return at_stored(reference.batch_norm(y, bn, training), scale * y.detach() + shift, dtype)


@torch.no_grad()
def check_sum(own: Tensor, want: Tensor, squares: Tensor, operations: int, dtype: torch.dtype) -> None:
    """A sum of products that may cancel, as gradients behind a norm do, which sum to zero: the roundings of its terms
    are independent, so its error is measured against the root of the sum of squared products where that is larger."""
    scale = torch.maximum(want.double().norm(), squares.double().sqrt().norm())
    assert float((own.double() - want).norm() / scale) <= operations * TOLERANCE[dtype], (own, want)


def compare_from_stored(x: Tensor, weights: list[Tensor | None], shape: BlockShape, grad: Tensor) -> None:
    """A training step in 16 bits against float64 at the convolution outputs that our own forward stored.

    Masks are then the same in both, so every result is a number of operations away from tensors that both have,
    and each of them rounds its operands and its output: what TOLERANCE allows for one.
    """
    dtype = x.dtype
    leaves = [w.clone().requires_grad_() for w in weights if w is not None]
    bns, bns64 = norms(shape, torch.float32), norms(shape, torch.float64)
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    z = inverted_residual(x, BlockWeights(*leaves), bns, shape, training=True, backend="triton")  # type: ignore[arg-type]
    saved = z.grad_fn.saved_tensors  # type: ignore[union-attr]
    _, y2, y3, y1 = (tensor for tensor in saved if tensor.dim() == 4 and tensor.dtype == dtype)
    stats2, stats3, stats1 = (tensor for tensor in saved if tensor.dim() == 2 and len(tensor) == 4)
    z.backward(grad)

    x64 = x.detach().double().requires_grad_()
    exact = [w.detach().to(torch.float32 if w.dim() == 4 else dtype).double().requires_grad_() for w in leaves]
    expand, depthwise, project = exact
    y1 = at_stored(reference.pointwise(x64, expand, shape.hidden), y1, dtype)
    u1 = norm_at_stored(y1, bns64[0], stats1, dtype)
    z1 = activate(u1, shape.activation)
    y2 = at_stored(reference.depthwise(z1, depthwise, shape.kernel, shape.stride), y2, dtype)
    u2 = norm_at_stored(y2, bns64[1], stats2, dtype)
    z2 = activate(u2, shape.activation)
    y3 = at_stored(reference.pointwise(z2, project, shape.out_channels), y3, dtype)
    u3 = norm_at_stored(y3, bns64[2], stats3, dtype)
    z64 = x64 + u3 if shape.residual else u3
    check(z.detach(), z64.detach(), dtype)

    z64.backward(grad.double())
    assert error(x.grad, x64.grad) <= 3 * TOLERANCE[dtype]
    convolutions = ((x64, y1, 1, 3), (z1, y2, shape.hidden, 2), (z2, y3, 1, 1))
    for own, want, (inputs, y, groups, operations) in zip(leaves, exact, convolutions, strict=True):
        kernel = [shape.kernel] * 2 if groups > 1 else [1, 1]
        size = (y.shape[1], inputs.shape[1] // groups, *kernel)
        stride = shape.stride if groups > 1 else 1
        squares = conv2d_weight(inputs**2, size, y.grad**2, stride, kernel[0] // 2, 1, groups)
        check_sum(own.grad, want.grad, squares, operations, dtype)
    for bn, bn64, y, u, operations in zip(bns, bns64, (y1, y2, y3), (u1, u2, u3), (3, 2, 1), strict=True):
        check(bn.running_mean, bn64.running_mean, dtype)
        check(bn.running_var, bn64.running_var, dtype)
        normalized = (y - y.mean((0, 2, 3), True)) / y.std((0, 2, 3), correction=0, keepdim=True)
        check_sum(bn.bias.grad, bn64.bias.grad, (u.grad**2).sum((0, 2, 3)), operations, dtype)
        check_sum(bn.weight.grad, bn64.weight.grad, (u.grad**2 * normalized**2).sum((0, 2, 3)), operations, dtype)


@pytest.mark.parametrize(("kernel", "stride"), product((3, 5, 7), (1, 2)))
def test_block(kernel: int, stride: int) -> None:
    compare_block(BlockShape(8, 24, 8 * stride, kernel, stride), 2, (7, 9), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_block_in_16_bits(dtype: torch.dtype) -> None:
    compare_block(BlockShape(16, 48, 16, 3, 1), 8, (7, 7), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_with_relu(dtype: torch.dtype, stride: int) -> None:
    compare_block(BlockShape(16, 48, 16, 3, stride, "relu"), 8, (7, 7), dtype)


@pytest.mark.parametrize(("outputs", "dtype"), [(208, torch.float32), (264, torch.bfloat16)])
def test_block_with_many_outputs(outputs: int, dtype: torch.dtype) -> None:
    """Their backward has tiles of its own."""
    compare_block(BlockShape(16, 48, outputs, 3, 1), 4, (7, 7), dtype)


def test_block_with_odd_widths() -> None:
    compare_block(BlockShape(5, 15, 7, 3, 1), 3, (5, 6), torch.float32)


def test_block_with_running_statistics() -> None:
    compare_block(BlockShape(8, 24, 8, 3, 1), 2, (7, 7), torch.float32, training=False)


@pytest.mark.parametrize("first_norm", [False, True])
def test_block_without_expansion(first_norm: bool) -> None:
    compare_block(BlockShape(8, 8, 16, 3, 1), 2, (7, 7), torch.float32, expand=False, first_norm=first_norm)


def test_block_without_expansion_has_a_shortcut() -> None:
    compare_block(BlockShape(8, 8, 8, 3, 1), 2, (7, 7), torch.float32, expand=False, first_norm=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("training", "activation"), [(True, "relu6"), (False, "relu6"), (True, "relu")])
def test_tail(dtype: torch.dtype, training: bool, activation: str) -> None:
    """Against float64, in 16 bits at the convolution outputs that were stored, as in `compare_from_stored`."""
    bn, bn64 = (nn.BatchNorm2d(40).to(DEVICE, kind) for kind in (torch.float32, torch.float64))
    nn.init.normal_(bn.bias, mean=1.0 if activation == "relu6" else 6.0)
    bn64.load_state_dict(bn.state_dict())
    x, weight, grad = (
        random(3, 24, 5, 4, dtype=dtype).requires_grad_(),
        random(40, 32).requires_grad_(),
        random(3, 40, 5, 4, dtype=dtype),
    )
    z = pointwise_bn_act(x, weight, bn, in_channels=24, activation=activation, training=training, backend="triton")
    _, _, y, stats, *_ = z.grad_fn.saved_tensors  # type: ignore[union-attr]
    z.backward(grad)

    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()
    y64 = at_stored(reference.pointwise(x64, weight64, 40), y, dtype)
    u64 = norm_at_stored(y64, bn64, stats, dtype, training)
    z64 = activate(u64, activation)
    check(z.detach(), z64.detach(), dtype)
    z64.backward(grad.double())
    check(x.grad, x64.grad, dtype)
    squares = conv2d_weight(x64.detach() ** 2, (40, 24, 1, 1), y64.grad**2)
    check_sum(weight.grad[:, :24], weight64.grad[:, :24], squares, 1, dtype)
    assert not weight.grad[:, 24:].any()
    mean, rstd = stats[2:, None, :, None, None].double()
    normalized = (y64.detach() - mean) * rstd
    check_sum(bn.bias.grad, bn64.bias.grad, (u64.grad**2).sum((0, 2, 3)), 1, dtype)
    check_sum(bn.weight.grad, bn64.weight.grad, (u64.grad**2 * normalized**2).sum((0, 2, 3)), 1, dtype)
    check(bn.running_mean, bn64.running_mean, dtype)
    check(bn.running_var, bn64.running_var, dtype)


def test_autocast_decides_the_dtype() -> None:
    shape = BlockShape(8, 24, 16, 3, 1)
    weights = BlockWeights(random(24, 8), random(24, 1, 3, 3), random(16, 24))
    x = random(2, 8, 5, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        z = inverted_residual(x, weights, norms(shape, torch.float32), shape, training=True, backend="triton")  # type: ignore[arg-type]
    assert z.dtype == torch.bfloat16
    assert reference.compute_dtype(x) == torch.float32


def test_results_are_bit_equal_from_run_to_run() -> None:
    shape = BlockShape(8, 24, 8, 3, 1)
    x, grad = random(2, 8, 7, 7), random(2, 8, 7, 7)
    weights: list[Tensor | None] = [random(24, 8), random(24, 1, 3, 3), random(8, 24)]
    first, second = (run_block("triton", x, weights, shape, grad, True, torch.float32, True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# ---- CUDA graphs: the real ones on a GPU, else their bookkeeping around kernels that run at each replay


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> graphs.Graphs:
    """Graphs turned on, of an empty store. Without a GPU a replay calls what was captured and copies the results."""

    def capture(run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        outputs = run()

        def replay() -> None:
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return outputs, replay

    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "capture", capture)
        monkeypatch.setattr(graphs, "spare_memory", lambda: 1)
        monkeypatch.setattr(graphs, "why_not", lambda x, backend: None)
    store = graphs.Graphs()
    monkeypatch.setattr(graphs, "GRAPHS", store)
    monkeypatch.setattr(graphs, "_switch", True)
    return store


class SmallBlock:
    """A block with parameters that steps change, fed with new images each step."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.shape = BlockShape(8, 16, 8, 3, 1)
        sizes = ((16, 8), (16, 1, 3, 3), (8, 16))
        self.weights = [torch.randn(size, generator=generator).to(DEVICE).requires_grad_() for size in sizes]
        self.norms = norms(self.shape, torch.float32)

    def forward(self, seed: int) -> Tensor:
        x = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()
        return inverted_residual(
            x, BlockWeights(*self.weights), self.norms, self.shape, training=True, backend="triton"
        )

    def parameters(self) -> list[Tensor]:
        return [*self.weights, *(p for norm in self.norms for p in norm.parameters())]

    def step(self, seed: int) -> Tensor:
        z = self.forward(seed)
        z.square().sum().backward()
        found = z.detach().clone()
        with torch.no_grad():
            for p in self.parameters():
                p -= 0.01 * p.grad
                p.grad = None
        return found

    def state(self) -> list[Tensor]:
        return [*self.parameters(), *(b for norm in self.norms for b in norm.buffers())]


def test_graphs_train_as_launches_do(recorded: graphs.Graphs) -> None:
    replayed, launched = SmallBlock(), SmallBlock()
    for seed in range(2):
        graphs.set_cuda_graphs(True)
        ours = replayed.step(seed)
        graphs.set_cuda_graphs(False)
        assert torch.equal(ours, launched.step(seed))
    assert len(recorded) == 1
    for mine, theirs in zip(replayed.state(), launched.state(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_tail_is_captured_too(recorded: graphs.Graphs) -> None:
    """Two steps, whose weights, running statistics and outputs a replay must follow."""
    found = []
    for on in (True, False):
        graphs.set_cuda_graphs(on)
        generator = torch.Generator().manual_seed(4)
        weight = torch.randn(16, 12, generator=generator).to(DEVICE).requires_grad_()
        bn = nn.BatchNorm2d(16).to(DEVICE)
        results = []
        for _ in range(2):
            x = torch.randn(2, 8, 3, 3, generator=generator).to(DEVICE).requires_grad_()
            z = pointwise_bn_act(x, weight, bn, in_channels=8, training=True, backend="triton")
            z.square().sum().backward()
            results += [z.detach().clone(), x.grad.clone()]
            with torch.no_grad():
                for p in (weight, bn.weight, bn.bias):
                    p -= 0.01 * p.grad
                    p.grad = None
        found.append([*results, weight.detach(), *bn.state_dict().values()])
        assert len(recorded) == int(on)  # the graphs went with the first round's parameters
        del weight, bn, p
        gc.collect()
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_add_up_over_replays(recorded: graphs.Graphs) -> None:
    """Autograd keeps a first gradient as it is: it must not be the buffer that the next replay overwrites."""
    replayed, launched = SmallBlock(), SmallBlock()
    for block, on in ((replayed, True), (launched, False)):
        graphs.set_cuda_graphs(on)
        for seed in range(2):
            block.forward(seed).sum().backward()
    for mine, theirs in zip(replayed.parameters(), launched.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_a_forward_that_waits_for_its_backward_keeps_its_buffers(recorded: graphs.Graphs) -> None:
    replayed, launched = SmallBlock(), SmallBlock()
    for block, on in ((replayed, True), (launched, False)):
        graphs.set_cuda_graphs(on)
        first, second = block.forward(0), block.forward(1)
        second.square().sum().backward()
        first.square().sum().backward()
    for mine, theirs in zip(replayed.parameters(), launched.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
    ((captured, *_),) = recorded._found.values()
    assert not captured.busy
    abandoned = replayed.forward(2)
    graphs.set_cuda_graphs(True)
    abandoned = replayed.forward(2)
    assert captured.busy
    del abandoned
    gc.collect()
    assert not captured.busy


def test_graphs_go_with_their_parameters(recorded: graphs.Graphs) -> None:
    block = SmallBlock()
    block.step(0)
    assert len(recorded) == 1
    block.weights[1] = block.weights[1].detach().clone().requires_grad_()
    gc.collect()
    assert len(recorded) == 0


def test_operations_are_launched_where_memory_is_short(
    recorded: graphs.Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "spare_memory", lambda: 0)
    SmallBlock().step(0)
    assert len(recorded) == 0


# ---- on a GPU only: real sizes, real tiles, real graphs


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU: without one nothing is captured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_graphs_train_a_full_size_block_bit_for_bit(recorded: graphs.Graphs, dtype: torch.dtype) -> None:
    shape = BlockShape(40, 240, 40, 5, 1)
    xs, grad = [random(12, 40, 56, 56, dtype=dtype) for _ in range(3)], random(12, 40, 56, 56, dtype=dtype)
    sizes = ((240, 40), (240, 1, 7, 7), (40, 240))
    masters = [random(*size) / 10 for size in sizes]
    found = []
    for on in (True, False):
        graphs.set_cuda_graphs(on)
        weights, bns = BlockWeights(*(m.clone().requires_grad_() for m in masters)), norms(shape, torch.float32)
        results = []
        for given in xs:
            x = given.clone(memory_format=torch.channels_last).requires_grad_()
            z = inverted_residual(x, weights, bns, shape, training=True, backend="triton")  # type: ignore[arg-type]
            z.backward(grad)
            results += [z.detach().clone(), x.grad.clone()]  # replays give a buffer that the next one overwrites
        found.append([*results, *(w.grad for w in weights), *(b for bn in bns for b in bn.buffers())])
        assert len(recorded) == int(on)  # the graphs go with the first round's parameters
        del weights, bns
        gc.collect()
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU: full-size maps take hours in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (BlockShape(16, 96, 32, 3, 2), 112),
        (BlockShape(40, 240, 40, 5, 1), 56),
        (BlockShape(40, 120, 48, 7, 2), 56),
        (BlockShape(56, 336, 56, 7, 1), 28),
        (BlockShape(112, 672, 112, 5, 1), 14),
        (BlockShape(128, 768, 192, 3, 2), 14),
        (BlockShape(224, 1344, 320, 7, 1), 7),
        (BlockShape(24, 72, 24, 5, 1), 33),
    ],
)
def test_full_size_block(shape: BlockShape, size: int, dtype: torch.dtype) -> None:
    compare_block(shape, 12, (size, size), dtype)
