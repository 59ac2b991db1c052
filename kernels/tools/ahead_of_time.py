"""Compile the kernels for GPUs that are not here, and read what the compiler made of them.

`recorded_launches` runs host code on meta tensors and keeps every launch instead of making it: the very arguments,
tiles and specialisations of a real run. `compile_launch` compiles one for a compute capability.
"""

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bsnas.kernels.block import BlockShape
from bsnas.kernels.gpu.launch import CachedLaunches

POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip
CONSTANTS_HAVE_ATTRIBUTES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@dataclass(frozen=True)
class Launch:
    fn: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.fn.__name__)


@dataclass(frozen=True)
class Resources:
    registers: int
    stack: int
    spills: int
    shared: int
    instructions: int
    opcodes: Counter[str]
    sass: str


def recorded_launches(run: Callable[[], Any], *, execute: bool = False) -> list[Launch]:
    """Every launch that `run` makes, in order; the kernels run only with `execute`, else tensors are kept as meta ones:
    those of a whole round would fill a GPU."""
    launches: list[Launch] = []
    original = CachedLaunches.launch

    def record(self: CachedLaunches, grid: tuple[int], *args: Any, **named: Any) -> None:
        if execute:
            original(self, grid, *args, **named)
        given = {name: named.pop(name, None) for name in ("num_warps", "num_stages", "maxnreg")}
        options: dict[str, int] = {name: value for name, value in given.items() if value is not None}
        arguments = dict(zip(self.fn.arg_names, args, strict=False)) | named
        if not execute:
            arguments = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        launches.append(Launch(self.fn, grid, arguments, options))

    CachedLaunches.launch = record  # type: ignore[method-assign]
    try:
        run()
    finally:
        CachedLaunches.launch = original  # type: ignore[method-assign]
    return launches


def block_launches(shape: BlockShape, batch: int, size: int, dtype: torch.dtype, expand: bool = True) -> list[Launch]:
    """What a training step of one block launches; without `expand` its input is a raw convolution output."""
    return recorded_launches(block_step(shape, batch, size, dtype, device="meta", expand=expand))


def block_step(
    shape: BlockShape, batch: int, size: int, dtype: torch.dtype, *, device: str, expand: bool = True
) -> Callable[[], None]:
    """A training step of one block over tensors of `device` that hold nothing: for its launches, not its values."""
    from bsnas.kernels.gpu.block import block_backward, block_forward

    def empty(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(dims, device=device, dtype=dtype)

    x = empty(batch, size, size, shape.in_channels, dtype=dtype).permute(0, 3, 1, 2)
    w1 = empty(shape.hidden, shape.in_channels) if expand else None
    w2, w3 = empty(shape.hidden, 1, shape.kernel, shape.kernel), empty(shape.out_channels, shape.hidden)
    widths = (shape.hidden, shape.hidden, shape.out_channels)
    affine = [empty(c) for c in widths for _ in range(2)]
    running = [t for c in widths for t in (empty(c), empty(c), empty(1, dtype=torch.int64))]

    def step() -> None:
        z, *saved = block_forward(
            x, w1, w2, w3, affine, running, [0.1] * 3, [1e-5] * 3, shape.dims, shape.activation, True
        )
        block_backward(torch.empty_like(z), x, w1, w2, w3, saved, 3, shape.dims, shape.activation, True)

    return step


def tail_launches(inputs: int, outputs: int, batch: int, size: int, dtype: torch.dtype) -> list[Launch]:
    """What a training step of the tail's pointwise convolution launches."""
    from bsnas.kernels.gpu.block import tail_backward, tail_forward

    def meta(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(dims, device="meta", dtype=dtype)

    x, weight = meta(batch, size, size, inputs, dtype=dtype).permute(0, 3, 1, 2), meta(outputs, inputs)
    running = [meta(outputs), meta(outputs), meta(1, dtype=torch.int64)]

    def step() -> None:
        z, *saved = tail_forward(x, weight, [meta(outputs), meta(outputs)], running, 0.1, 1e-5, "relu6", True)
        tail_backward(torch.empty_like(z), x, weight, saved, "relu6", True)

    return recorded_launches(step)


def inference_launches(shape: BlockShape, batch: int, size: int, dtype: torch.dtype, segments: int) -> list[Launch]:
    """What scoring a block launches: folded for no segments, else with the scale and shift of each."""
    from bsnas.kernels.gpu.inference import Triton

    def meta(*dims: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(dims, device="meta", dtype=dtype)

    def vectors(channels: int) -> tuple[torch.Tensor, ...]:
        if not segments:
            return (meta(channels),)
        return meta(segments, channels, dtype=torch.float32), meta(segments, channels, dtype=torch.float32)

    x = meta(batch, size, size, shape.in_channels).permute(0, 3, 1, 2)
    taps = meta(shape.hidden, 1, shape.kernel, shape.kernel)
    expand, project = meta(shape.hidden, shape.in_channels), meta(shape.out_channels, shape.hidden)
    pointwise = Triton.segmented_pointwise if segments else Triton.folded_pointwise
    depthwise = Triton.segmented_depthwise if segments else Triton.folded_depthwise

    def run() -> None:
        y = pointwise(x, expand, *vectors(shape.hidden), activation=shape.activation)
        y = depthwise(y, taps, *vectors(shape.hidden), stride=shape.stride, activation=shape.activation)
        residual = x if shape.residual else None
        pointwise(y, project, *vectors(shape.out_channels), activation=None, residual=residual)

    return recorded_launches(run)


def specialisation(launch: Launch) -> tuple[str, ...]:
    """What distinguishes compiled kernels: launches with equal ones run the same code."""
    code = source(launch)
    return (launch.name, *(str(part) for part in (launch.options, code.signature, code.constants, code.attrs)))


def fill_cache(build: Callable[[], list[Launch]], capability: int, processes: int) -> list[str]:
    """Compile all that `build` launches into Triton's cache on disk, in parallel; returns what failed, and why.

    `build` is a module-level function or a partial of one: every process calls it and compiles its share.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_share, build, capability, i, processes) for i in range(processes)]
        return [failure for job in jobs for failure in job.result()]


def _compile_share(build: Callable[[], list[Launch]], capability: int, share: int, shares: int) -> list[str]:
    return compile_share(build(), capability, share, shares)


def compile_share(launches: list[Launch], capability: int, share: int, shares: int, threads: int = 1) -> list[str]:
    """Compile one of `shares` equal parts of the different codes into the cache; returns what failed, and why.

    Triton compiles outside of Python's lock for the most part, and in threads of its own where it is asked to.
    """
    unique = {specialisation(launch): launch for launch in launches}

    def failure(launch: Launch) -> str | None:
        try:
            triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
        except Exception as error:  # a candidate too large for the GPU; a launch would raise the same again
            return f"{launch.name}: {type(error).__name__}: {str(error)[:80]}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        return [said for said in pool.map(failure, list(unique.values())[share::shares]) if said is not None]


def source(launch: Launch) -> ASTSource:
    """What a launch compiles. Triton looks for it in its cache by all of this, empty lists of attributes included:
    of constants since 3.7, before of those that are strings."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.fn.params):
        value = launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            if CONSTANTS_HAVE_ATTRIBUTES or isinstance(value, str):
                attributes[(index,)] = []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            pointer = isinstance(value, torch.Tensor)
            signature[parameter.name] = POINTER[value.dtype] if pointer else "i32"
            if specialised:
                attributes[(index,)] = [["tt.divisibility", 16]] if pointer or value % 16 == 0 else []
    return ASTSource(launch.fn, signature=signature, constexprs=constants, attrs=attributes)


def compile_launch(launch: Launch, capability: int) -> Resources:
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=launch.options)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(option: str) -> str:
            return subprocess.run([tool, option, str(cubin)], capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("--dump-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    opcodes = Counter(
        match.group(1)
        for match in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", sass, re.MULTILINE)
    )
    return Resources(
        registers=int(found[1]), stack=int(found[2]), spills=opcodes["LDL"] + opcodes["STL"],
        shared=compiled.metadata.shared, instructions=sum(opcodes.values()) - opcodes["NOP"],
        opcodes=opcodes, sass=sass,
    )  # fmt: skip
