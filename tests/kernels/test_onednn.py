"""The CPU's training block against the reference: values, all gradients, and the norms' running statistics."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bsnas.kernels import BlockShape, BlockWeights, choose_backend, inverted_residual, pointwise_bn_act
from bsnas.kernels.cpu import native
from tests import ROOT
from tests.kernels.tolerances import TOLERANCE, error

SIZES = [(8, 8), (7, 9), (1, 5)]
"""Height and width: of whole tiles, of broken ones, smaller than every kernel."""


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    backend: str, shape: BlockShape, size: tuple[int, int], dtype: torch.dtype, *, training: bool = True,
    kind: str = "expand", mean: float = 0.0, spread: float = 1.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Results of a block on 3 images. Kinds: expand; plain, without an expansion; raw, whose input has a norm.

    Activations scatter by `spread` around 1.
    """
    in_channels, hidden, out_channels = shape.in_channels, shape.hidden, shape.out_channels
    tensors = {
        "x": random(3, in_channels, *size) + mean * random(in_channels, 1, 1, seed=1),
        "expand": random(hidden + 3, in_channels + 2, seed=2) / in_channels**0.5,
        "depthwise": random(hidden + 3, 1, 7, 7, seed=3) / shape.kernel,
        "project": random(out_channels + 1, hidden + 3, seed=4) / hidden**0.5,
    }
    if kind != "expand":
        del tensors["expand"]
    leaves = {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}
    norms: list[nn.BatchNorm2d | None] = []
    for i, channels in enumerate((hidden, hidden, out_channels)):
        bn = nn.BatchNorm2d(channels, momentum=None if i == 1 else 0.1, dtype=dtype)
        with torch.no_grad():
            bn.weight.copy_(spread * (1 + 0.3 * random(channels, seed=5 + i)))
            bn.bias.copy_(1 + random(channels, seed=8 + i))
            bn.running_mean.copy_(random(channels, seed=11 + i))  # type: ignore[union-attr]
            bn.running_var.copy_(1 + random(channels, seed=14 + i).abs())  # type: ignore[union-attr]
        norms.append(bn)
    if kind == "plain":
        norms[0] = None
    weights = BlockWeights(leaves.get("expand"), leaves["depthwise"], leaves["project"])
    z = inverted_residual(leaves["x"], weights, tuple(norms), shape, training=training, backend=backend)  # type: ignore[arg-type]
    z.backward(random(*z.shape, seed=20).to(dtype))
    found = {"z": z.detach()} | {f"d_{name}": leaf.grad for name, leaf in leaves.items()}  # type: ignore[misc]
    for i, bn in enumerate(norms):
        if bn is not None:
            found |= {f"d_weight{i}": bn.weight.grad, f"d_bias{i}": bn.bias.grad}  # type: ignore[dict-item]
            found |= {name + str(i): buffer.to(dtype) for name, buffer in bn.named_buffers()}
    return found


def compare(shape: BlockShape, size: tuple[int, int], **options: object) -> None:
    """Both in float64, where no mask of ReLU6 flips."""
    expected = run("reference", shape, size, torch.float64, **options)  # type: ignore[arg-type]
    found = run("onednn", shape, size, torch.float64, **options)  # type: ignore[arg-type]
    for name, value in expected.items():
        # A gradient of exactly zero in theory is rounding in both: compare with the size of a unit gradient.
        assert (found[name] - value).norm() <= 1e-10 * value.norm().clamp_min(1.0), name


@pytest.mark.parametrize(("kernel", "stride", "size"), product((3, 5, 7), (1, 2), SIZES))
def test_block(kernel: int, stride: int, size: tuple[int, int]) -> None:
    compare(BlockShape(6, 18, 6 * stride, kernel, stride), size)


@pytest.mark.parametrize("kind", ["expand", "plain", "raw"])
@pytest.mark.parametrize("training", [True, False])
def test_kinds_of_blocks(kind: str, training: bool) -> None:
    hidden = 60 if kind == "expand" else 20
    compare(BlockShape(20, hidden, 20, 5, 1), (6, 5), kind=kind, training=training)


@pytest.mark.parametrize("kind", ["expand", "plain", "raw"])
def test_relu(kind: str) -> None:
    hidden = 60 if kind == "expand" else 20
    compare(BlockShape(20, hidden, 20, 3, 2, "relu"), (6, 5), kind=kind, spread=4.0)


@pytest.mark.parametrize("widths", [(1, 3, 1), (64, 192, 64), (70, 210, 65)])
def test_widths_of_both_pointwise_ways(widths: tuple[int, int, int]) -> None:
    compare(BlockShape(*widths, 3, 1), (4, 4))


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_float32(mean: float) -> None:
    """Rounding only, also where an input's mean is a thousand times its spread and x itself is normalised."""
    shape = BlockShape(16, 16, 8, 3, 1)
    exact = run("reference", shape, (9, 9), torch.float64, kind="raw", mean=mean)
    eager = run("reference", shape, (9, 9), torch.float32, kind="raw", mean=mean)
    ours = run("onednn", shape, (9, 9), torch.float32, kind="raw", mean=mean)
    for name, value in exact.items():
        assert error(ours[name], value) <= max(TOLERANCE[torch.float32], 2 * error(eager[name], value)), name


@pytest.mark.parametrize("backend", ["reference", "onednn"])
@pytest.mark.parametrize("kind", ["expand", "raw"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_gradcheck(backend: str, kind: str, kernel: int, stride: int) -> None:
    """Of x, the weights, and weight and bias of every norm, through full-size weights."""
    inputs = 3 if kind == "expand" else 6
    shape = BlockShape(inputs, 6, 3, kernel, stride)
    bns = tuple(nn.BatchNorm2d(channels, dtype=torch.float64) for channels in (6, 6, 3))
    affine = [
        p
        for i, bn in enumerate(bns)
        for p in (1 + 0.3 * random(*bn.weight.shape, seed=5 + i), random(*bn.bias.shape, seed=8 + i))
    ]

    def block(x: Tensor, depthwise: Tensor, project: Tensor, *rest: Tensor) -> Tensor:
        expand = rest[-1] if kind == "expand" else None
        for i, bn in enumerate(bns):
            del bn.weight, bn.bias
            bn.weight, bn.bias = rest[2 * i], rest[2 * i + 1]  # plain tensors: a Parameter would cut the graph
        weights = BlockWeights(expand, depthwise, project)
        return inverted_residual(x, weights, bns, shape, training=True, backend=backend)  # type: ignore[arg-type]

    given = [random(2, inputs, 4, 3), random(7, 1, 7, 7, seed=2), random(4, 7, seed=3), *affine]
    if kind == "expand":
        given.append(random(7, 4, seed=1))
    assert torch.autograd.gradcheck(block, tuple(value.requires_grad_() for value in given))


@pytest.mark.parametrize("backend", ["reference", "onednn"])
def test_gradcheck_of_the_tail(backend: str) -> None:
    bn = nn.BatchNorm2d(5, dtype=torch.float64)

    def tail(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        del bn.weight, bn.bias
        bn.weight, bn.bias = gamma, beta
        return pointwise_bn_act(x, weight, bn, in_channels=3, training=True, backend=backend)

    given = random(2, 3, 3, 2), random(5, 4, seed=1), 1 + 0.3 * random(5, seed=2), random(5, seed=3)
    assert torch.autograd.gradcheck(tail, tuple(value.requires_grad_() for value in given))


@pytest.mark.parametrize(("training", "activation"), [(True, "relu6"), (False, "relu6"), (True, "relu")])
def test_tail(training: bool, activation: str) -> None:
    found = {}
    for backend in ("reference", "onednn"):
        x, weight = random(3, 20, 4, 5).requires_grad_(), random(40, 24, seed=1).requires_grad_()
        bn = nn.BatchNorm2d(40, dtype=torch.float64)
        nn.init.uniform_(bn.bias, 0, 8, generator=torch.Generator().manual_seed(0))
        z = pointwise_bn_act(x, weight, bn, in_channels=20, activation=activation, training=training, backend=backend)
        z.backward(random(*z.shape, seed=2))
        found[backend] = [z, x.grad, weight.grad, bn.weight.grad, bn.bias.grad, *bn.buffers()]
    for expected, value in zip(*found.values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_nan_stays_visible() -> None:
    shape = BlockShape(8, 8, 8, 3, 1)
    weights = BlockWeights(None, torch.randn(8, 1, 3, 3), torch.randn(8, 8))
    x = torch.randn(2, 8, 5, 5)
    x[0, 0, 0, 0] = float("nan")
    bns = (nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    assert inverted_residual(x, weights, bns, shape, training=True, backend="onednn").isnan().any()


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    shape, threads = BlockShape(20, 60, 20, 5, 1), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            bn = nn.BatchNorm2d(60)
            y = native.image_moments(random(5, 60, 6, 6).float().contiguous(memory_format=torch.channels_last))
            stats = native.finalize(y, 36, bn.weight.detach(), bn.bias.detach(), None, 0.1, 1e-5)
            x = random(5, 60, 6, 6, seed=1).float().contiguous(memory_format=torch.channels_last)
            weight = random(60, 1, 5, 5, seed=2).float()
            out, _ = native.depthwise_forward(x, stats, weight, shape, moments=False)
            coefficients, *_ = native.finalize_backward(
                native.gradient_sums(out, x, stats, activation="relu6"), stats, 180
            )
            found.append(native.depthwise_backward(out, x, stats, coefficients, x, stats, weight, shape))
    finally:
        torch.set_num_threads(threads)
    for dx, d_weight, sums in found[1:]:
        assert torch.equal(dx, found[0][0])
        assert torch.equal(d_weight, found[0][1])
        assert torch.equal(torch.stack(sums), torch.stack(found[0][2]))


def test_an_unknown_kernel_size_runs_on_the_reference() -> None:
    shape = BlockShape(4, 4, 8, 9, 1)
    weights = BlockWeights(None, torch.randn(4, 1, 9, 9), torch.randn(8, 4))
    z = inverted_residual(torch.randn(2, 4, 9, 9), weights, (None, nn.BatchNorm2d(4), nn.BatchNorm2d(8)), shape,
                          training=True, backend="onednn")  # fmt: skip
    assert torch.isfinite(z).all()


def test_one_value_per_channel_is_refused() -> None:
    shape = BlockShape(4, 4, 8, 3, 1)
    weights = BlockWeights(None, torch.randn(4, 1, 3, 3), torch.randn(8, 4))
    norms = (None, nn.BatchNorm2d(4), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match="more than one value per channel"):
        inverted_residual(torch.randn(1, 4, 1, 1), weights, norms, shape, training=True, backend="onednn")


def test_half_precision_is_left_to_the_reference() -> None:
    x = torch.randn(1, 4, 4, 4)
    assert choose_backend(x) == "onednn"
    assert choose_backend(x.bfloat16()) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_backend(x) == "reference"
        with pytest.raises(RuntimeError, match="float32 or float64"):
            choose_backend(x, "onednn")


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no compiler found, looked for no-such-compiler"), ("false", "its C\\+\\+ part cannot")],
)
def test_without_a_compiler_the_reference_trains(compiler: str, reason: str, tmp_path: Path) -> None:
    script = f"""
import re, torch, warnings
from bsnas.kernels import choose_backend
x = torch.randn(1, 4, 4, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert choose_backend(x) == "reference"
assert re.search("plain torch, about half as fast: .*" + {reason!r}, str(caught[0].message)), caught
try:
    choose_backend(x, "onednn")
except RuntimeError as error:
    assert re.search({reason!r}, str(error)), error
else:
    raise AssertionError
"""
    environment = os.environ | {"CXX": compiler, "BSNAS_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, cwd=ROOT)


BUILD = "from bsnas.kernels.cpu import native; assert native.why_not() is None, native.why_not(); print('built')"


def build(cache: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", BUILD], env=os.environ | {"BSNAS_CACHE": str(cache)}, cwd=ROOT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_processes_build_side_by_side_and_without_a_cache(tmp_path: Path) -> None:
    """Two at once into one directory, a third where there is none to be had; nothing half-built is left."""
    no_directory = tmp_path / "file"
    no_directory.write_text("")
    running = [build(tmp_path / "cache"), build(tmp_path / "cache"), build(no_directory)]
    for process in running:
        out, err = process.communicate(timeout=800)
        assert out == "built\n", err
    (library,) = (tmp_path / "cache" / "native").iterdir()
    assert library.suffix == ".so"
