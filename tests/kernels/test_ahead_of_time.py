"""Compile all kernels for GPUs that need not be here, and hold them to a checked-in budget (budgets.json).

In bfloat16 every kernel and shape class of the paper's Table 1, in training and in scoring; float32 and float16, which
have no table of tiles, for some of its blocks: on an H100 with its table, on other Hoppers and on an A100 by rule.
Budgets belong to a Triton version; under another one only what must hold everywhere is checked: no spills, no stack,
tensor cores in the 16-bit matrix products, shared memory within the GPU's. After a deliberate change:

    BSNAS_WRITE_BUDGETS=1 python -m pytest -n 0 tests/kernels/test_ahead_of_time.py
"""

import hashlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests import ROOT

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bsnas.benchmarks.kernel_bytes import bytes_moved
from bsnas.benchmarks.parts.kernel.mean_path import (
    CLUSTERS,
    SEPARABLE,
    STEM,
    TAIL,
    PlacedBlock,
    mean_path,
    table_shapes,
)
from bsnas.kernels.block import BlockShape
from bsnas.kernels.gpu import configs
from bsnas.kernels.gpu.configs import A100, H100, Gpu, meta_tensors_stand_for
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.tools.ahead_of_time import (
    Launch,
    Resources,
    block_launches,
    compile_launch,
    inference_launches,
    specialisation,
    tail_launches,
)

DIRECTORY = ROOT / "kernels" / "gpu"
BUDGETS = Path(__file__).parent / "budgets.json"
WRITE = os.environ.get("BSNAS_WRITE_BUDGETS") == "1"
HOPPER = H100._replace(name="another Hopper")  # has no table
MATRIX = (
    "pointwise_forward",
    "pointwise_inference",
    "project_backward",
    "expand_backward",
    "input_gradient",
    "weight_gradient",
)
SLACK = 1.1
SHARES = 24
BATCH = 256

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE_KERNELS = {  # one block for each kernel size, stride and map; table_shapes has kernel 3
    (kernel, shape.stride, size): PlacedBlock(replace(shape, kernel=kernel), size)
    for kernel in (5, 7)
    for shape, size in table_shapes()
}
TABLE = [*mean_path(), *table_shapes(), *LARGE_KERNELS.values()]
SOME = [*mean_path()[2:7], LARGE_KERNELS[5, 2, 28], mean_path()[-1]]  # every kernel size and stride, narrow and wide
COMPILED = [
    (90, H100, BF16, TABLE),
    (90, HOPPER, BF16, TABLE),
    (90, HOPPER, FP32, SOME),
    (90, HOPPER, FP16, SOME),
    (80, A100, BF16, TABLE),
    (80, A100, FP32, SOME),
    (80, A100, FP16, SOME),
]


class Compiled(NamedTuple):
    launch: Launch
    capability: int
    gpu: Gpu
    dtype: torch.dtype


def launches(dtype: torch.dtype, blocks: list[PlacedBlock]) -> Iterator[Launch]:
    for shape, size in blocks:
        yield from block_launches(shape, BATCH, size, dtype)
        for segments in (0, 8):
            yield from inference_launches(shape, BATCH, size, dtype, segments)
    for inputs in CLUSTERS[-1][1]:
        yield from tail_launches(inputs, TAIL, BATCH, blocks[-1].size, dtype)
    yield from block_launches(BlockShape(STEM, STEM, SEPARABLE, 3, 1), BATCH, 112, dtype, False)


@cache
def compiled() -> dict[str, Compiled]:
    """All different codes, by what budgets call them: tiles to read, and a digest of all else that they depend on."""
    found = {}
    for capability, gpu, dtype, blocks in COMPILED:
        with meta_tensors_stand_for(gpu):
            for launch in launches(dtype, blocks):
                digest = hashlib.sha256(repr(specialisation(launch)).encode()).hexdigest()[:8]
                tiles = "x".join(str(v) for k, v in launch.arguments.items() if re.fullmatch("B[A-Z]|BLOCK|TW", k))
                options = " ".join(f"{name.removeprefix('num_')} {value}" for name, value in launch.options.items())
                name = f"sm_{capability} {str(dtype).removeprefix('torch.')} {launch.name} {tiles} {options} {digest}"
                found.setdefault(name, Compiled(launch, capability, gpu, dtype))
    return found


def loop_instructions(sass: str) -> int:
    """Instructions of the longest loop: what a depthwise kernel issues for a row of outputs a thread."""
    longest = 0
    for at, target in re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*BRA[^;]*?(0x[0-9a-f]+)", sass):
        if int(target, 16) < int(at, 16):
            longest = max(longest, (int(at, 16) - int(target, 16)) // 16 + 1)
    return longest


def measure(launch: Launch, found: Resources) -> dict[str, float]:
    values: dict[str, float] = {
        "registers": found.registers,
        "shared": found.shared,
        "instructions": found.instructions,
    }
    if launch.name.startswith("depthwise_forward"):
        per_thread = launch.arguments["BT"] * launch.arguments["BC"] // (32 * launch.options["num_warps"])
        outputs = launch.arguments["TW"] * max(per_thread, 1)
        values["instructions_per_output"] = round(loop_instructions(found.sass) / outputs, 1)
    return values


def faults(name: str, of: Compiled, found: Resources) -> Iterator[str]:
    """What is wrong with a launch once compiled, whatever its budget."""
    if found.spills or found.stack:
        yield f"{name}: {found.spills} spills, a stack of {found.stack} bytes"
    if found.shared > of.gpu.shared_memory:
        yield f"{name}: {found.shared} bytes of shared memory"
    product = "HGMMA" if of.capability == 90 else "HMMA"
    if of.dtype != FP32 and of.launch.name.startswith(MATRIX) and not found.opcodes[product]:
        yield f"{name}: no {product}"


def excesses(name: str, values: dict[str, float], budget: dict[str, float] | None) -> Iterator[str]:
    """Where a launch takes more than its budget, or that it has none."""
    if budget is None:
        yield f"{name}: no budget; write one as the docstring of {Path(__file__).name} says"
        return
    for what, value in budget.items():
        if values[what] > SLACK * value:
            yield f"{name}: {what} {values[what]}, budget {value}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("share", range(SHARES))
def test_every_launch_compiles_without_spills_within_its_budget(share: int) -> None:
    assert not (WRITE and "PYTEST_XDIST_WORKER" in os.environ), "several processes would write one file; use -n 0"
    every = compiled()
    table: dict[str, dict[str, dict[str, float]]] = json.loads(BUDGETS.read_text())
    if WRITE:
        table[triton.__version__] = {k: v for k, v in table.get(triton.__version__, {}).items() if k in every}
    budgets = table.get(triton.__version__)
    wrong = []
    for name in list(every)[share::SHARES]:
        of = every[name]
        found = compile_launch(of.launch, of.capability)
        wrong += faults(name, of, found)
        values = measure(of.launch, found)
        if WRITE:
            table[triton.__version__][name] = values
        if budgets is not None:
            wrong += excesses(name, values, budgets.get(name))
    if WRITE:
        BUDGETS.write_text(as_lines(table))
    assert not wrong, "\n".join(wrong)


def as_lines(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """JSON with a launch to a line."""
    versions = [
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f" {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
        + "\n}"
        for version, rows in table.items()
    ]
    return "{" + ",\n".join(versions) + "}\n"


def test_every_entry_of_the_tables_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever class a table names is one that the launches above look up."""
    asked = set()
    classes = {"pointwise_class": configs.pointwise_class, "depthwise_class": configs.depthwise_class}
    for name, original in classes.items():

        def recorded(*args: object, original: Callable[..., str] = original) -> str:
            asked.add(found := original(*args))
            return found

        monkeypatch.setattr(configs, name, recorded)
    tables = {path.stem: json.loads(path.read_text()) for path in configs.DIRECTORY.glob("*.json")}
    for name, table in tables.items():
        for _, gpu, dtype, blocks in COMPILED:
            if gpu.name == name:
                with meta_tensors_stand_for(gpu):
                    list(launches(dtype, blocks))
        named = {shape_class for entries in table.values() for shape_class in entries}
        assert len(named) > 50
        assert named <= asked, (name, named - asked)


def test_every_kernel_is_compiled() -> None:
    """All that are defined in the modules of the Triton kernels."""
    modules = [importlib.import_module(f"bsnas.kernels.gpu.{path.stem}") for path in DIRECTORY.glob("[!_]*.py")]
    defined = {k.fn.__name__ for module in modules for k in vars(module).values() if isinstance(k, CachedLaunches)}
    assert len(defined) >= 15
    for capability, dtype in product((80, 90), (BF16, FP16, FP32)):
        names = {of.launch.name for of in compiled().values() if (of.capability, of.dtype) == (capability, dtype)}
        fused = {"expand_backward_kernel"} if dtype == FP32 else set()  # whose float32 sums would not fit in registers
        shared = {of.launch.name for of in compiled().values() if of.capability == capability}  # the same for any dtype
        assert defined - fused <= names | {n for n in shared if n.startswith(("finalize", "reduce"))}, (
            capability,
            dtype,
        )


@pytest.mark.parametrize(("shape", "size"), mean_path())
def test_bytes_moved_stay_near_the_floor(shape: BlockShape, size: int) -> None:
    """Each kernel's arguments against its activations, each once; what is not counted: benchmarks/kernel_bytes.py."""
    for launch in block_launches(shape, 256, size, BF16):
        moved, _, floor = bytes_moved(launch)
        if floor:
            assert moved <= 1.1 * floor, (launch.name, moved, floor)
