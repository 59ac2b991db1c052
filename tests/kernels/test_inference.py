"""Folded and segmented convolutions equal convolution, batch normalisation and activation one after another."""

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bsnas.kernels import set_backend
from bsnas.kernels.inference import (
    fold_norm,
    folded_depthwise,
    folded_pointwise,
    packed_depthwise,
    scale_and_shift,
    segment_affine_,
    segment_statistics,
    segmented_depthwise,
    segmented_pointwise,
)
from bsnas.kernels.plan import activate

BACKENDS = ["reference", "onednn"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
POINTWISE = [(1, 8, 24, 5), (3, 16, 40, 7), (2, 64, 96, 4), (5, 72, 432, 2), (2, 130, 97, 1)]
"""Images, input and output channels, size: matrix products and convolutions, odd sizes among them."""


def skip_unless_it_runs(backend, dtype):
    if backend == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if backend == "onednn" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN convolves in bfloat16 on processors with AVX-512 or AVX-NE-CONVERT only")


def images(n, c, size, dtype=torch.float32):
    return torch.randn(n, c, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("tail", [None, "relu6", "relu", "residual"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", POINTWISE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_pointwise(backend, shape, dtype, tail, sliced):
    skip_unless_it_runs(backend, dtype)
    n, cin, cout, size = shape
    x, bias = images(n, cin, size, dtype), torch.randn(cout).to(dtype)
    weight = torch.randn(cout + 3, cin + 5).to(dtype)[:cout, :cin] if sliced else torch.randn(cout, cin).to(dtype)
    residual = images(n, cout, size, dtype) if tail == "residual" else None
    expected = F.conv2d(x.double(), weight.double()[:, :, None, None], bias.double())
    if residual is not None:
        expected = expected + residual.double()
    activation = None if tail == "residual" else tail
    expected = activate(expected, activation)
    y = folded_pointwise(x, weight, bias, activation=activation, residual=residual, backend=backend)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype] * cin**0.5, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", [None, "relu6", "relu"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("n", "c", "size", "kernel"), [(2, 8, 9, 3), (1, 24, 6, 5), (3, 40, 2, 7), (2, 7, 1, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_depthwise(backend, n, c, size, kernel, stride, dtype, packed, activation):
    skip_unless_it_runs(backend, dtype)
    if packed and backend == "reference":
        pytest.skip("packed weights are for the backend that runs fastest")
    x, weight, bias = images(n, c, size, dtype), torch.randn(c, 1, kernel, kernel).to(dtype), torch.randn(c).to(dtype)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), stride=stride, padding=kernel // 2, groups=c)
    given = packed_depthwise(weight, size, stride) if packed else weight
    y = folded_depthwise(x, given, bias, stride=stride, activation=activation, backend=backend)
    assert y.shape[2] == -(-size // stride)
    expected = activate(expected, activation)
    torch.testing.assert_close(y.double(), expected, atol=TOLERANCE[dtype] * kernel, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_have_scale_and_shift_of_their_own(backend, segments):
    skip_unless_it_runs(backend, torch.float32)
    n, cin, cout = 4, 72, 100
    x, residual = images(segments * n, cin, 3), images(segments * n, cout, 3)
    weight, depth = torch.randn(cout, cin), torch.randn(cin, 1, 5, 5)
    for activation, shortcut in (("relu6", None), ("relu", None), (None, residual), (None, None)):
        scale, shift = torch.randn(segments, cout), torch.randn(segments, cout)
        y = segmented_pointwise(x, weight, scale, shift, activation=activation, residual=shortcut, backend=backend)
        for s in range(segments):
            rows = slice(s * n, (s + 1) * n)
            expected = F.conv2d(x[rows], weight[:, :, None, None]) * scale[s, :, None, None] + shift[s, :, None, None]
            if shortcut is not None:
                expected = expected + shortcut[rows]
            torch.testing.assert_close(y[rows], activate(expected, activation), atol=2e-4, rtol=1e-4)
    scale, shift = torch.randn(segments, cin), torch.randn(segments, cin)
    y = segmented_depthwise(x, depth, scale, shift, stride=2, activation="relu6", backend=backend)
    for s in range(segments):
        rows = slice(s * n, (s + 1) * n)
        expected = F.conv2d(x[rows], depth, stride=2, padding=2, groups=cin)
        expected = (expected * scale[s, :, None, None] + shift[s, :, None, None]).clamp(0, 6)
        torch.testing.assert_close(y[rows], expected, atol=2e-4, rtol=1e-4)


def test_folded_norm_is_the_norm_in_eval_mode():
    norm = nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    norm.running_var.uniform_(0.1, 4)
    x = images(2, 6, 4)
    scale, shift = fold_norm(norm)
    torch.testing.assert_close(x * scale[:, None, None] + shift[:, None, None], norm(x))


def test_segment_statistics_and_affine_are_the_norm_in_train_mode():
    norm = nn.BatchNorm2d(6).train()
    nn.init.normal_(norm.weight)
    x = torch.cat([images(4, 6, 3) * 3 + 5, images(4, 6, 3)]).contiguous(memory_format=torch.channels_last)
    mean, var = segment_statistics(x, 2)
    y = segment_affine_(x.clone(), *scale_and_shift(norm, mean, var), activation=None)
    torch.testing.assert_close(y, torch.cat([norm(x[:4]), norm(x[4:])]), atol=1e-5, rtol=1e-5)


def test_a_backend_that_cannot_run_says_why():
    x, weight, bias = images(1, 8, 2), torch.randn(8, 8), torch.randn(8)
    with pytest.raises(ValueError, match="backend 'winograd' is unknown; allowed are reference, triton, onednn"):
        folded_pointwise(x, weight, bias, activation=None, backend="winograd")
    with pytest.raises(RuntimeError, match="'onednn' cannot run: it runs on the CPU and the tensor is on meta"):
        folded_pointwise(x.to("meta"), weight, bias, activation=None, backend="onednn")
    with pytest.raises(RuntimeError, match=r"not in torch\.float64"):
        folded_pointwise(x.double(), weight.double(), bias.double(), activation=None, backend="onednn")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="'triton' cannot run: it needs an NVIDIA GPU"):
            folded_pointwise(x, weight, bias, activation=None, backend="triton")


def test_a_forced_backend_also_scores(monkeypatch):
    """`set_backend` and BSNAS_KERNELS rule evaluation as they rule training."""
    x, weight, bias = images(1, 8, 2), torch.randn(8, 1, 3, 3), torch.randn(8)
    monkeypatch.setenv("BSNAS_KERNELS", "reference")
    given = packed_depthwise(weight, 2, 1)
    assert given is weight
    folded = folded_depthwise(x, given, bias, stride=1, activation="relu6")
    assert torch.equal(folded, folded_depthwise(x, weight, bias, stride=1, activation="relu6", backend="reference"))
    set_backend("triton")
    try:
        if os.environ.get("TRITON_INTERPRET") != "1":
            with pytest.raises(RuntimeError, match="'triton' cannot run"):
                folded_depthwise(x, weight, bias, stride=1, activation="relu6")
    finally:
        set_backend(None)
