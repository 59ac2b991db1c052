"""The public operations, and the one place where a backend is chosen for them."""

import importlib.util
import os
import subprocess
import warnings
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from bsnas.kernels import graphs, reference
from bsnas.kernels.block import BlockShape, BlockWeights, check_slice
from bsnas.kernels.cpu import block as onednn_block
from bsnas.kernels.cpu import native

Backend = Literal["reference", "triton", "onednn"]
Norms = tuple[nn.BatchNorm2d | None, nn.BatchNorm2d, nn.BatchNorm2d]

DRIVER_NOT_BUILT = "Triton's driver cannot be built here"
_forced: str | None = None


def set_backend(name: str | None) -> None:
    """Force a backend for all later calls; None chooses by device again. Wins over BSNAS_KERNELS.

    Raises ValueError for an unknown name. One that cannot run raises RuntimeError when it is called.
    """
    global _forced
    _forced = None if name is None else _known(name)


def _known(name: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"backend {name!r} is unknown; allowed are {', '.join(get_args(Backend))}; or force none")
    return name


def forced_backend() -> str | None:
    """What `set_backend` forces, else BSNAS_KERNELS, else None. Raises ValueError for an unknown name."""
    name = _forced or os.environ.get("BSNAS_KERNELS") or None
    return None if name is None else _known(name)


def why_not(name: str, x: Tensor) -> str | None:
    """Why the backend cannot train on x, or None when it can."""
    return _why_not(name, x.device, x.dtype, reference.compute_dtype(x))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache
def _why_not(name: str, device: torch.device, dtype: torch.dtype, computed: torch.dtype) -> str | None:
    """What does not change while a process lives, and is asked at every operation of every pass."""
    if name == "triton":
        return why_not_triton(device, computed)
    if name == "onednn":
        if device.type != "cpu":
            return f"it runs on the CPU and the tensor is on {device.type}"
        if computed != dtype or dtype not in (torch.float32, torch.float64):
            return f"it trains in float32 or float64, not in {computed}"
        return native.why_not() if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache
def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels cannot run on a device, computing in dtype, or None when they can."""
    kind = device.type
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs an NVIDIA GPU (or TRITON_INTERPRET=1) and the tensor is on {kind}"
    if kind == "cuda" and torch.version.hip is not None:
        return "it needs an NVIDIA GPU"
    if kind == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, bfloat16 or float16, not in {dtype}"
    return _driver_fault() if kind == "cuda" else None


@lru_cache
def _driver_fault() -> str | None:
    """Why Triton cannot launch, beginning with DRIVER_NOT_BUILT, or None. Its driver, in C, is built at first use."""
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except (RuntimeError, OSError, AssertionError, subprocess.CalledProcessError) as error:
        return (
            f"{DRIVER_NOT_BUILT}: {str(error).strip() or type(error).__name__}; install a C compiler and Python's "
            "headers (apt-get install gcc python3-dev), or name a compiler in CC"
        )
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@lru_cache
def warn_of(reason: str) -> None:
    """Say once that plain torch runs in place of kernels that one installation away would be there."""
    if reason.startswith(native.NOT_BUILT):
        warnings.warn(f"blocks train on plain torch, about half as fast: {reason}", stacklevel=4)
    if reason.startswith(DRIVER_NOT_BUILT):
        warnings.warn(f"blocks run on plain torch, which is slower: {reason}", stacklevel=4)


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The backend for x: the argument, else `set_backend`, else BSNAS_KERNELS, else the fastest that can run.

    Raises RuntimeError when a forced backend, or CUDA graphs that are switched on, cannot run, and says why.
    """
    chosen = _chosen(x, backend or forced_backend())
    graphs.check(x, chosen)
    return chosen


def _chosen(x: Tensor, forced: str | None) -> str:
    if forced is None:
        fastest = "triton" if x.device.type == "cuda" else "onednn"
        reason = why_not(fastest, x)
        if reason is None:
            return fastest
        warn_of(reason)
        return "reference"
    reason = why_not(_known(forced), x)
    if reason is not None:
        raise RuntimeError(f"backend {forced!r} cannot run: {reason}; use 'reference', or force none")
    return forced


def inverted_residual(
    x: Tensor,
    weights: BlockWeights,
    norms: Norms,
    shape: BlockShape,
    *,
    training: bool,
    backend: str | None = None,
) -> Tensor:
    """Inverted residual block (MobileNetV2; paper, section 3.1) on slices of full-size weights.

    x [N, in_channels, H, W], best channels_last -> [N, out_channels, ceil(H / stride), ceil(W / stride)] in the compute
    dtype, which is autocast's where autocast is on for the device and x's own elsewhere; accumulation is in float32 or
    wider. Expand, BN, ReLU6; depthwise, BN, ReLU6; project, BN; identity shortcut where the shape has one. With
    `training` each norm uses the batch's statistics and updates its running ones exactly as torch.nn.BatchNorm2d does,
    else it uses the running ones; `bn.training` is not looked at.

    Without an expansion but with a first norm, x is a raw convolution output (the stem's): norm and ReLU6 come first,
    in the depthwise convolution's own loads, and there is no shortcut.

    Raises ValueError when the shape is no slice of the weights, RuntimeError when a forced backend cannot run.
    """
    check_slice(weights, shape, x.shape[1])
    chosen = choose_backend(x, backend)
    if chosen == "triton":
        from bsnas.kernels.gpu import block as triton_block

        return triton_block.inverted_residual(x, weights, norms, shape, training=training)
    if chosen == "onednn":
        return onednn_block.inverted_residual(x, weights, norms, shape, training=training)
    return reference.inverted_residual(x, weights, norms, shape, training=training)


def pointwise_bn_relu6(
    x: Tensor,
    weight: Tensor,
    bn: nn.BatchNorm2d,
    *,
    in_channels: int,
    training: bool,
    backend: str | None = None,
) -> Tensor:
    """The tail: 1x1 convolution, BN, ReLU6. x [N, in_channels, H, W], weight [out, in_max] -> [N, out, H, W].

    Dtypes, statistics and errors as in `inverted_residual`.
    """
    if x.shape[1] != in_channels or weight.shape[1] < in_channels:
        raise ValueError(
            f"in_channels {in_channels} with x {tuple(x.shape)} and weight {tuple(weight.shape)}; x must have exactly "
            "that many channels and the weight at least that many inputs"
        )
    chosen = choose_backend(x, backend)
    if chosen == "triton":
        from bsnas.kernels.gpu import block as triton_block

        return triton_block.pointwise_bn_relu6(x, weight, bn, training=training)
    if chosen == "onednn":
        return onednn_block.pointwise_bn_relu6(x, weight, bn, in_channels=in_channels, training=training)
    return reference.pointwise_bn_relu6(x, weight, bn, in_channels=in_channels, training=training)
