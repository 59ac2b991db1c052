"""Which implementation runs an operation: the one choice, for training and for scoring."""

import importlib.util
import os
import subprocess
import warnings
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from bsnas.kernels import graphs, reference
from bsnas.kernels.compiler import constant, opaque
from bsnas.kernels.cpu import native

Backend = Literal["reference", "triton", "onednn"]
Work = Literal["train", "score"]
"""`train`: blocks with batch statistics and gradients. `score`: convolutions with folded or per-segment norms."""

DRIVER_NOT_BUILT = "Triton's driver cannot be built here"
_forced: str | None = None


def set_backend(name: str | None) -> None:
    """Force a backend for all later calls; None chooses by device again. Wins over BSNAS_KERNELS.

    Raises ValueError for an unknown name. One that cannot run raises RuntimeError when it is called.
    """
    global _forced
    _forced = None if name is None else _known(name)


def choose_backend(x: Tensor, backend: str | None = None, work: Work = "train") -> str:
    """The backend for x: the argument, else `set_backend`, else BSNAS_KERNELS, else the fastest that can run.

    Raises ValueError for an unknown name, and RuntimeError when a forced backend, or CUDA graphs that are switched on,
    cannot run, and says why.
    """
    forced = backend or _forced or os.environ.get("BSNAS_KERNELS") or None
    if forced is None:
        chosen = "triton" if x.device.type == "cuda" else "onednn"
        reason = _why_not(chosen, x, work)
        if reason is not None:
            _warn_of(reason)
            chosen = "reference"
    else:
        chosen = _known(forced)
        reason = _why_not(chosen, x, work)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run: {reason}; use 'reference', or force none")
    graphs.check(x, chosen)
    return chosen


def _known(name: str) -> str:
    if name not in get_args(Backend):
        raise ValueError(f"backend {name!r} is unknown; allowed are {', '.join(get_args(Backend))}; or force none")
    return name


def _why_not(name: str, x: Tensor, work: Work) -> str | None:
    """Why the backend cannot do this with x, or None when it can. Scoring does not look at autocast."""
    computed = reference.compute_dtype(x) if work == "train" else x.dtype
    return why_not_on(name, work, x.device, x.dtype, computed)


@constant
@lru_cache
def why_not_on(name: str, work: Work, device: torch.device, dtype: torch.dtype, computed: torch.dtype) -> str | None:
    """What does not change while a process lives, and is asked at every operation of every pass."""
    if name == "triton":
        return why_not_triton(device, computed)
    if name == "onednn":
        return _why_not_onednn(work, device, dtype, computed)
    return None


def _why_not_onednn(work: Work, device: torch.device, dtype: torch.dtype, computed: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU and the tensor is on {device.type}"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if work == "train":
        if computed != dtype or dtype not in (torch.float32, torch.float64):
            return f"it trains in float32 or float64, not in {computed}"
        return native.why_not()
    # In bfloat16 oneDNN convolves with AVX-512 or AVX-NE-CONVERT only.
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    return f"it computes in float32, or in bfloat16 where the processor has it, not in {dtype}"


@constant
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
    return driver_fault() if kind == "cuda" else None


@lru_cache
def driver_fault() -> str | None:
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


@constant
@lru_cache
def _warn_of(reason: str) -> None:
    """Say once that plain torch runs in place of kernels that one installation away would be there."""
    if reason.startswith(native.NOT_BUILT):
        warnings.warn(f"blocks train on plain torch, about half as fast: {reason}", stacklevel=4)
    if reason.startswith(DRIVER_NOT_BUILT):
        warnings.warn(f"blocks run on plain torch, which is slower: {reason}", stacklevel=4)


@opaque
def say_unfused(x: Tensor, form: str) -> None:
    """Say once for each form of a block that no fused kernel knows it, where one would have run."""
    if choose_backend(x) != "reference":
        _warn_of_form(form)


@lru_cache
def _warn_of_form(form: str) -> None:
    warnings.warn(f"no fused kernel knows blocks of {form}; they train on plain torch", stacklevel=4)


def forget() -> None:
    """As if no device had been asked yet: for tests."""
    for known in (why_not_on, why_not_triton, driver_fault, _warn_of, _warn_of_form):
        known.cache_clear()
