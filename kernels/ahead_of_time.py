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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


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


def recorded_launches(run: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self, tuple(grid), arguments, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        run()
    finally:
        JITFunction.run = original
    return launches


def source(launch: Launch) -> ASTSource:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.fn.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTER[value.dtype]
            divisible = True
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            divisible = value % 16 == 0
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
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
        shared=compiled.metadata.shared, instructions=sum(opcodes.values()) - opcodes["NOP"], opcodes=opcodes, sass=sass,
    )  # fmt: skip
