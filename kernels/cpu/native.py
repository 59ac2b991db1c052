"""The C++ kernels of native.cpp: compiled at first use, and called on channels-last tensors.

The compiler is $CXX, or else the first of c++, g++, clang++. The library is kept in ~/.cache/bsnas/native (or below
$BSNAS_CACHE), named by a hash of the source, the command and the processor, and built again when one of them changes.
It appears there whole, so processes may build it side by side; where that directory cannot be written, a process builds
one for itself.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bsnas.kernels.block import BlockShape

KERNELS = (3, 5, 7)
"""Depthwise kernel sizes that native.cpp is compiled for."""
BOUNDS = {"relu6": 6.0, "relu": float("inf"), None: -1.0}
"""What activations stop at, as native.cpp is told of them."""
NOT_BUILT = "its C++ part cannot be built here"
_SOURCE = Path(__file__).with_name("native.cpp")
_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_POINTER, _SIZE, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
_ARGUMENTS = {
    "depthwise_forward": [ctypes.POINTER(_SIZE), _SIZE, _DOUBLE, *[_POINTER] * 7, _INT],
    "depthwise_backward": [ctypes.POINTER(_SIZE), _SIZE, _DOUBLE, *[_POINTER] * 14, _INT],
    "image_moments": [_SIZE] * 3 + [_POINTER] * 3 + [_INT],
    "finalize": [_SIZE] * 3 + [_POINTER] * 6 + [_DOUBLE] * 2 + [_POINTER] * 4,
    "apply": [_SIZE] * 2 + [_POINTER] * 4 + [_DOUBLE, _POINTER, _INT],
    "gradient_sums": [_SIZE] * 3 + [_POINTER] * 5 + [_DOUBLE] + [_POINTER] * 2 + [_INT],
    "finalize_backward": [_SIZE, _DOUBLE] + [_POINTER] * 8,
    "apply_backward": [_SIZE] * 2 + [_POINTER] * 4 + [_DOUBLE] + [_POINTER] * 2 + [_INT],
}


# ---- the library


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why the library cannot be had on this machine, beginning with NOT_BUILT, or None. Compiles it if need be."""
    try:
        _library()
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"{NOT_BUILT}: {lines[0] if lines else error}"
    return None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built()))
    for name, arguments in _ARGUMENTS.items():
        for suffix in _SUFFIX.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, None
    return library


def _built() -> Path:
    """Path of the compiled library. Raises OSError without a compiler, CalledProcessError when it fails."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise OSError(f"no compiler found, looked for {', '.join(compilers)}; install g++ 10 or newer, or set CXX")
    command = [compiler, "-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fPIC", "-shared", "-fopenmp", str(_SOURCE)]
    # torch brings its own OpenMP; a second one would keep a second pool of threads on the same cores.
    command += map(str, sorted((Path(torch.__file__).parent / "lib").glob("libgomp*")))
    identity = "\n".join([_SOURCE.read_text(), *command, torch.__version__, _processor()])
    cache = Path(os.environ.get("BSNAS_CACHE") or Path.home() / ".cache" / "bsnas") / "native"
    library = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(dir=cache)
    except OSError:  # read-only, or no directory
        folder = tempfile.mkdtemp(prefix="bsnas-native-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        library = Path(folder) / library.name
    built = Path(folder) / "native.so"
    try:
        subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
        built.replace(library)
    finally:
        if library.parent != Path(folder):
            shutil.rmtree(folder, ignore_errors=True)
    return library


def _processor() -> str:
    """What -march=native looks at: the library may lie in a home directory that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _call(name: str, dtype: torch.dtype, *arguments: object) -> None:
    getattr(_library(), f"{name}_{_SUFFIX[dtype]}")(
        *(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    )


# ---- its functions, on tensors of one dtype, float32 or float64; all of them channels-last and dense

Stats = Tensor
"""[4, C]: mean, rstd, and scale and shift with which the norm is z = scale * y + shift."""
Moments = tuple[Tensor, Tensor]
"""Per image and channel, [N, C] in float64: mean and sum of squared deviations."""
Sums = tuple[Tensor, Tensor]
"""[C] in float64: over dz and over dz * (y - mean)."""


def _dims(x: Tensor, stride: int) -> ctypes.Array[ctypes.c_int64]:
    images, channels, height, width = x.shape
    return (_SIZE * 5)(images, height, width, channels, stride)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _moments_of(y: Tensor) -> Moments:
    size = (y.shape[0], y.shape[1])
    return torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)


def _empty_sums(channels: int) -> Sums:
    return torch.empty(channels, dtype=torch.float64), torch.empty(channels, dtype=torch.float64)


def depthwise_forward(
    x: Tensor, stats: Stats | None, weight: Tensor, shape: BlockShape, *, moments: bool
) -> tuple[Tensor, Moments | None]:
    """Raw depthwise convolution of x [N, C, H, W], or of act(norm(x)) where it has a norm.

    weight [C, 1, k, k] -> y [N, C, ceil(H / stride), ceil(W / stride)], and the moments of y if asked for.
    """
    images, channels, height, width = x.shape
    y = x.new_empty((images, -(-height // shape.stride), -(-width // shape.stride), channels)).permute(0, 3, 1, 2)
    found = _moments_of(y) if moments else None
    scale, shift = (None, None) if stats is None else (stats[2], stats[3])
    mean, m2 = found or (None, None)
    _call(
        "depthwise_forward", x.dtype, _dims(x, shape.stride), shape.kernel, BOUNDS[shape.activation],
        x, scale, shift, weight, y, mean, m2, torch.get_num_threads(),
    )  # fmt: skip
    return y, found


def depthwise_backward(
    dz: Tensor, y: Tensor, y_stats: Stats, coefficients: Tensor, x: Tensor, x_stats: Stats | None, weight: Tensor,
    shape: BlockShape,
) -> tuple[Tensor, Tensor, Sums]:  # fmt: skip
    """From dz, the gradient of act(norm(y)), to those of the convolution's input before its own, and of its weight.

    The sums belong to the input's norm and are zero without one.
    """
    dx, d_weight, sums = torch.empty_like(x), torch.empty_like(weight), _empty_sums(x.shape[1])
    mean, scale, shift = (None, None, None) if x_stats is None else (x_stats[0], x_stats[2], x_stats[3])
    _call(
        "depthwise_backward", x.dtype, _dims(x, shape.stride), shape.kernel, BOUNDS[shape.activation],
        dz, y, y_stats[2], y_stats[3], coefficients, x, scale, shift, mean, weight, dx, d_weight, *sums,
        torch.get_num_threads(),
    )  # fmt: skip
    return dx, d_weight, sums


def image_moments(y: Tensor) -> Moments:
    """The moments of y [N, C, H, W]."""
    mean, m2 = _moments_of(y)
    _call("image_moments", y.dtype, y.shape[0], _pixels(y), y.shape[1], y, mean, m2, torch.get_num_threads())
    return mean, m2


def finalize(
    moments: Moments, pixels: int, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor] | None,
    momentum: float, eps: float,
) -> Stats:  # fmt: skip
    """Statistics of a batch of images of so many pixels; moves the running mean and variance."""
    mean, m2 = moments
    stats = weight.new_empty((4, weight.shape[0]))
    running_mean, running_var = running or (None, None)
    _call(
        "finalize", weight.dtype, mean.shape[0], pixels, mean.shape[1], mean, m2, weight, bias, running_mean,
        running_var, momentum, eps, *stats.unbind(),
    )  # fmt: skip
    return stats


def apply(y: Tensor, stats: Stats, *, activation: str | None = None, shortcut: Tensor | None = None) -> Tensor:
    """norm(y), then the activation or + shortcut."""
    z = torch.empty_like(y)
    rows, threads = y.shape[0] * _pixels(y), torch.get_num_threads()
    _call("apply", y.dtype, rows, y.shape[1], y, stats[2], stats[3], shortcut, BOUNDS[activation], z, threads)
    return z


def gradient_sums(dz: Tensor, y: Tensor, stats: Stats, *, activation: str | None) -> Sums:
    """The sums that the backward of norm(y), followed by an activation or not, needs."""
    total, product = _empty_sums(y.shape[1])
    _call(
        "gradient_sums", y.dtype, y.shape[0], _pixels(y), y.shape[1], dz, y, stats[2], stats[3], stats[0],
        BOUNDS[activation], total, product, torch.get_num_threads(),
    )  # fmt: skip
    return total, product


def finalize_backward(sums: Sums, stats: Stats, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> coefficients [3, C] of dy = a * dz + b * y + c, and the gradients of the norm's weight and bias.

    `count` is the number of values of each channel that the statistics came from, 0 where they are constants.
    """
    channels = stats.shape[1]
    coefficients = stats.new_empty((3, channels))
    d_weight, d_bias = stats.new_empty(channels), stats.new_empty(channels)
    _call(
        "finalize_backward", stats.dtype, channels, float(count), *sums, stats[0], stats[1], stats[2], d_weight,
        d_bias, coefficients,
    )  # fmt: skip
    return coefficients, d_weight, d_bias


def apply_backward(dz: Tensor, y: Tensor, stats: Stats, coefficients: Tensor, *, activation: str | None) -> Tensor:
    """The gradient of y from dz, that of norm(y) followed by an activation or not."""
    dy = torch.empty_like(y)
    _call(
        "apply_backward", y.dtype, y.shape[0] * _pixels(y), y.shape[1], dz, y, stats[2], stats[3], BOUNDS[activation],
        coefficients, dy, torch.get_num_threads(),
    )  # fmt: skip
    return dy
