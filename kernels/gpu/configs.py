"""Tile sizes of the Triton kernels: a rule that fits any GPU, and a table of measured exceptions per GPU.

`configs/<gpu>.json` maps an operation to {shape class: configuration}, null for an expansion's backward in two kernels.
It is written by benchmarks/tune_kernels.py. An
unknown GPU, or a class that is not in its table, takes the rule: nothing is ever tuned while a user waits.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bsnas.kernels.gpu.support import cdiv, next_power_of_2

DIRECTORY = Path(__file__).parent / "configs"


class Gpu(NamedTuple):
    """What a choice of tiles depends on."""

    name: str
    """For file names, see `model`."""
    operands_in_registers: bool
    """A product's operands lie in registers beside its sums; wgmma and tcgen05 read them from shared memory."""
    multiprocessors: int
    shared_memory: int
    """Bytes that one program may have."""


H100 = Gpu("nvidia-h100", operands_in_registers=False, multiprocessors=132, shared_memory=227 * 1024)
_INTERPRETER = H100._replace(name="", multiprocessors=1)  # so that its grids stay small
_meta = H100


@contextmanager
def meta_tensors_stand_for(gpu: Gpu) -> Iterator[None]:
    """Within it, launches over meta tensors are those of that GPU; otherwise those of an H100."""
    global _meta
    before, _meta = _meta, gpu
    try:
        yield
    finally:
        _meta = before


def gpu_of(device: torch.device) -> Gpu:
    if device.type == "cuda":
        return _cuda(device)
    return _meta if device.type == "meta" else _INTERPRETER


@lru_cache
def _cuda(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        model(properties.name),
        operands_in_registers=properties.major not in (9, 10, 11),  # consumer Blackwell, 12, has the older mma alone
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # stubs lack it
    )


def model(name: str) -> str:
    """Words up to the model's number: "NVIDIA H100 80GB HBM3" is "nvidia-h100", a GeForce RTX 4070 is not a 4090.

    Memory size and form, which follow it, do not choose tiles.
    """
    found = re.match(r"\D*\S*", re.sub(r"[^a-z0-9]+", " ", name.lower()).strip())
    assert found
    return found[0].strip().replace(" ", "-")


def multiprocessors(device: torch.device) -> int:
    return gpu_of(device).multiprocessors


class PointwiseConfig(NamedTuple):
    """Tiles of a matrix product over pixels; what n and k stand for is said at each kernel's rule."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    waves: int
    """Programs per multiprocessor that the rows are split into."""


class DepthwiseConfig(NamedTuple):
    """`strips` strips of `columns` columns, `channels` channels of each, to a program."""

    columns: int
    strips: int
    channels: int
    warps: int
    prefetch: bool = True
    """Backward only: load the next rows before this one's arithmetic, where registers are left for them."""
    registers: int | None = None
    """Forward only: the most that a thread may have. None: the compiler may spill some to fit one program more."""


@lru_cache
def _table(gpu: Gpu) -> dict[str, dict[str, list[int] | None]]:
    path = DIRECTORY / f"{gpu.name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def pointwise_class(x: Tensor, inner: int, outer: int) -> str:
    """Rows to the next power of 4, widths to the next multiple of 32: shapes that one configuration serves."""
    rows = next_power_of_2(x.numel() // x.shape[-1])
    rows = rows if rows.bit_length() % 2 else rows * 2
    return f"{str(x.dtype).removeprefix('torch.')} m{rows} k{cdiv(inner, 32) * 32} n{cdiv(outer, 32) * 32}"


def depthwise_class(x: Tensor, kernel: int, stride: int) -> str:
    """Kernel, stride and the map's width; images and channels only set the number of programs."""
    return f"{str(x.dtype).removeprefix('torch.')} k{kernel} s{stride} w{x.shape[2]}"


@lru_cache(maxsize=4096)
def pointwise_rule(
    operation: str, small: bool, float32: bool, inner: int, outer: int, operands_in_registers: bool
) -> PointwiseConfig | None:
    """The default tiles. `small`: too few rows to fill a GPU with tall tiles. None: see `expand_backward_config`."""
    narrow = max(next_power_of_2(outer), 16)
    sums = cdiv(inner, 64) * 64 * narrow  # of a weight gradient of the expansion, in registers
    if operands_in_registers and float32:  # less to a thread, for operands are split in two there
        if operation == "pointwise_forward":
            return PointwiseConfig(64, min(narrow, 64), 32 if narrow < 64 and inner > 16 else 16, 8, 3, 4)
        if operation == "pointwise_forward_prologue":
            return PointwiseConfig(64, min(narrow, 64), 16, 8, 3, 4)
        if operation == "input_gradient":
            return PointwiseConfig(64, min(narrow, 64), 32, 8, 3, 1)
    elif operands_in_registers:  # tiles whose sums and operands are in registers together
        if operation == "pointwise_forward" and inner > 32 and narrow >= 64:
            return PointwiseConfig(64 if small else 128, 64, 64, 8, 3, 4)
        if operation == "pointwise_forward_prologue" and narrow in (32, 64):
            return PointwiseConfig(64, narrow, narrow, 8, 3, 4)
        if operation == "project_backward":
            return PointwiseConfig(64, 32, min(narrow, 64), 8, 2, 4)
        if operation == "expand_backward" and sums >= 8192:
            return PointwiseConfig(64, narrow, 32, 8, 1, 2) if sums <= 12288 else None
        if operation == "expand_backward" and sums > 4096:
            return PointwiseConfig(32, narrow, 64, 8, 2, 2)
        if operation == "weight_gradient":
            return PointwiseConfig(64 if outer <= 256 else 32, 32, min(narrow, 64), 8, 2, 2)
    if operation == "pointwise_forward":  # n: outputs, k: inputs
        block_k = min(max(next_power_of_2(inner), 16), 32 if float32 else 64)
        return PointwiseConfig(64 if small or float32 else 128, min(narrow, 64), block_k, 4, 3, 4)
    if operation == "pointwise_forward_prologue":
        block_n = min(narrow, 128 if float32 else 256)
        if block_n == 256:
            return PointwiseConfig(64, block_n, 32, 8, 4, 4)
        return PointwiseConfig(64, block_n, 32 if float32 else 64, 4 if block_n <= 64 else 8, 3, 4)
    if operation == "project_backward":  # n: hidden, k: outputs (tiles of it)
        if float32:
            if outer > 200:  # the only tile without spills: sums and split operands of all outputs are in registers
                return PointwiseConfig(16, 8, 32, 4, 1, 4)
            return PointwiseConfig(32 if outer <= 96 else 16, 16, min(narrow, 32), 8, 1, 4)
        if outer > 256:
            return PointwiseConfig(32, 64, 64, 8, 2, 2)
        return PointwiseConfig(64, 64, min(narrow, 64), 8, 2, 4)
    if operation == "expand_backward":  # n: inputs, k: hidden (tiles of it)
        if sums > 24576 or float32:
            return None
        return PointwiseConfig(64, narrow, 64, 4 if sums <= 8192 else 8, 2, 2)
    if operation == "input_gradient":  # n: inputs, k: hidden
        block_n = min(narrow, 64 if float32 else 256)
        return PointwiseConfig(64, block_n, 32, 4 if block_n <= 64 else 8, 3, 1)
    assert operation == "weight_gradient", operation  # n: hidden, k: inputs (tiles of it)
    if float32:
        return PointwiseConfig(32, 16, min(narrow, 64), 8, 1, 2)
    return PointwiseConfig(64, 64, min(narrow, 64), 4 if outer <= 64 else 8, 2, 2)


def _pointwise(operation: str, x: Tensor, inner: int, outer: int) -> PointwiseConfig | None:
    gpu = gpu_of(x.device)
    table = _table(gpu).get(operation, {})
    shape_class = pointwise_class(x, inner, outer)
    if shape_class in table:
        values = table[shape_class]
        config = None if values is None else PointwiseConfig(*values)
    else:
        rows = x.numel() // x.shape[-1]
        small, float32 = rows < 256 * gpu.multiprocessors, x.element_size() == 4
        config = pointwise_rule(operation, small, float32, inner, outer, gpu.operands_in_registers)
    if config is None:
        return None
    while (
        config.stages > 1 and shared_bytes(operation, config, inner, outer, x.element_size(), gpu) > gpu.shared_memory
    ):
        config = config._replace(stages=config.stages - 1)
    return config


def shared_bytes(operation: str, config: PointwiseConfig, inner: int, outer: int, itemsize: int, gpu: Gpu) -> int:
    """About what a program takes: buffers of the loads of a step, unrolled tiles together, and what waits for products.

    Loads that pass through registers on their way to a product have a buffer less than stages; so have all where
    operands lie in registers, and in tiles of fewer than 64 rows, which wgmma and tcgen05 do not take.
    """
    m, n, k = config[:3]
    through, direct, kept = 0, (m + n) * k, 0
    if operation == "project_backward":
        tiles = cdiv(outer, k)
        through, direct, kept = m * n, tiles * m * k, tiles * n * k
        if cdiv(inner, n) <= 4:  # the gradient is made of two tensors, see `project_backward`
            through, direct = through + 2 * direct, 0
    elif operation == "expand_backward":
        tiles = cdiv(inner, k)
        through, direct = 2 * tiles * m * k, m * n + tiles * n * k
    elif operation == "input_gradient":
        through, direct = 2 * m * k, n * k
    elif operation == "weight_gradient":
        through, direct = 2 * m * n, cdiv(outer, k) * m * k
    buffers = (config.stages - 1) * (through + direct) + (0 if gpu.operands_in_registers or m < 64 else direct)
    return (buffers + kept + m * n + m * k) * itemsize + 1024


def pointwise_config(x: Tensor, inner: int, outer: int, prologue: bool) -> PointwiseConfig:
    config = _pointwise("pointwise_forward_prologue" if prologue else "pointwise_forward", x, inner, outer)
    assert config is not None
    return config


def project_backward_config(y2: Tensor, hidden: int, out: int) -> PointwiseConfig:
    config = _pointwise("project_backward", y2, hidden, out)
    assert config is not None
    return config


def expand_backward_config(y: Tensor, hidden: int, inputs: int) -> PointwiseConfig | None:
    """None where the sums of the weight gradient do not fit in registers, or two kernels are faster."""
    return _pointwise("expand_backward", y, hidden, inputs)


def input_gradient_config(y: Tensor, hidden: int, inputs: int) -> PointwiseConfig:
    config = _pointwise("input_gradient", y, hidden, inputs)
    assert config is not None
    return config


def weight_gradient_config(y: Tensor, hidden: int, inputs: int) -> PointwiseConfig:
    config = _pointwise("weight_gradient", y, hidden, inputs)
    assert config is not None
    return config


def _columns(width: int, choices: tuple[int, ...]) -> int:
    """The widest strip that divides the map, else the one that wastes least of it."""
    return min(choices, key=lambda columns: (cdiv(width, columns) * columns, -columns))


def depthwise_rule(
    kernel: int, stride: int, out_width: int, dtype: torch.dtype, operands_in_registers: bool
) -> DepthwiseConfig:
    columns = _columns(out_width, (7, 4) if stride == 1 else (7, 4, 2))
    per_thread = 1 if kernel == 7 else 2
    # Where the compiler spills some registers to fit one program more on a multiprocessor: kernel and stride.
    spilling = [(3, 1), (7, 2)] if dtype == torch.float16 else []
    if operands_in_registers and dtype == torch.bfloat16:
        spilling = [(3, 1)]
    return DepthwiseConfig(
        columns, 128 * per_thread // 16, 16, 4, registers=255 if (kernel, stride) in spilling else None
    )


def depthwise_backward_rule(kernel: int, stride: int, width: int) -> DepthwiseConfig:
    columns = _columns(width, (7, 4) if stride == 1 and kernel < 7 else (4,))
    return DepthwiseConfig(columns, 8, 16, 4, kernel < 5 or stride == 2)


def depthwise_config(x: Tensor, kernel: int, stride: int, out_width: int) -> DepthwiseConfig:
    gpu = gpu_of(x.device)
    values = _table(gpu).get("depthwise_forward", {}).get(depthwise_class(x, kernel, stride))
    if values is None:
        return depthwise_rule(kernel, stride, out_width, x.dtype, gpu.operands_in_registers)
    return DepthwiseConfig(*values)  # type: ignore[arg-type]


def depthwise_backward_config(x: Tensor, kernel: int, stride: int) -> DepthwiseConfig:
    values = _table(gpu_of(x.device)).get("depthwise_backward", {}).get(depthwise_class(x, kernel, stride))
    return depthwise_backward_rule(kernel, stride, x.shape[2]) if values is None else DepthwiseConfig(*values)  # type: ignore[arg-type]


def elementwise_config(channels: int) -> tuple[int, int, int]:
    """(rows, channels, warps) of a program of the element-wise kernels: 4096 elements, 16 bytes a thread and access."""
    block_c = min(max(next_power_of_2(channels), 16), 128)
    return 4096 // block_c, block_c, 4
