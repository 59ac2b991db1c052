"""Compile the kernels for GPUs that need not be here, and hold them to a checked-in budget (budgets.json).

Budgets belong to a Triton version; under another one only what must hold everywhere is checked: no spills, no stack,
tensor cores in the 16-bit matrix products, shared memory within the GPU's. After a deliberate change:

    BSNAS_WRITE_BUDGETS=1 python -m pytest tests/kernels/test_ahead_of_time.py
"""

import importlib
import json
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.kernel_bytes import bytes_moved
from benchmarks.mean_path import mean_path
from kernels.ahead_of_time import (
    Launch,
    Resources,
    block_launches,
    compile_launch,
    inference_launches,
    specialisation,
    tail_launches,
)
from kernels.block import BlockShape
from kernels.configs import A100, H100, meta_tensors_stand_for
from kernels.launch import CachedLaunches

DIRECTORY = Path(__file__).parents[2] / "kernels"
BUDGETS = Path(__file__).parent / "budgets.json"
WRITE = os.environ.get("BSNAS_WRITE_BUDGETS") == "1"
GPUS = {80: A100, 90: H100}
MATRIX = (
    "pointwise_forward",
    "pointwise_inference",
    "project_backward",
    "expand_backward",
    "input_gradient",
    "weight_gradient",
)
SLACK = 1.1

BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    # early, tall and skinny; depthwise k3, stride 2
    (90, BlockShape(16, 96, 32, 3, 2), 112, BF16, ""),
    # late, wide; its depthwise kernels are the first case's with other tiles, k3 stride 1
    (90, BlockShape(192, 1152, 192, 3, 1), 7, BF16, ""),
    (90, BlockShape(48, 288, 48, 5, 1), 28, BF16, "depthwise"),
    (90, BlockShape(48, 144, 56, 7, 1), 28, BF16, "depthwise"),
    (90, BlockShape(56, 336, 72, 7, 2), 28, BF16, "depthwise"),
    (90, BlockShape(16, 48, 24, 3, 2), 112, FP32, "pointwise_forward"),
    (90, BlockShape(192, 576, 192, 3, 1), 7, FP32, "project_backward"),
    (90, BlockShape(192, 576, 192, 3, 1), 7, FP32, "gradient_kernel"),
    (80, BlockShape(16, 96, 32, 3, 2), 112, BF16, "pointwise"),
    (80, BlockShape(16, 96, 32, 3, 2), 112, BF16, "depthwise"),
    (80, BlockShape(48, 288, 48, 5, 1), 28, BF16, "depthwise"),
    (80, BlockShape(56, 336, 72, 7, 1), 28, BF16, "depthwise"),
    # every kind of product, narrow and wide
    (80, BlockShape(48, 144, 48, 3, 1), 28, BF16, "backward_kernel"),
    (80, BlockShape(224, 1344, 280, 3, 1), 7, BF16, "project_backward"),
    (80, BlockShape(224, 1344, 280, 3, 1), 7, BF16, "gradient_kernel"),
    (80, BlockShape(192, 576, 192, 3, 1), 7, FP32, "project_backward"),
    (80, BlockShape(192, 576, 192, 3, 1), 7, FP32, "gradient_kernel"),
]


def launches(shape: BlockShape, size: int, dtype: torch.dtype, only: str) -> dict[str, Launch]:
    """Those of a training step of one block whose kernel's name has `only` in it, by what budgets call them."""
    found = {specialisation(launch): launch for launch in block_launches(shape, 256, size, dtype)}
    case = f"{described(shape)} {size} {str(dtype).removeprefix('torch.')}"
    return {
        f"{case} {launch.name} {launch.arguments.get('PROLOGUE', '')}".strip(): launch
        for launch in found.values()
        if only in launch.name
    }


def described(shape: BlockShape) -> str:
    return f"{shape.in_channels}-{shape.hidden}-{shape.out_channels} k{shape.kernel} s{shape.stride}"


def other_launches() -> dict[str, Launch]:
    """Of kernels, and variants of them, that no training step of a block with an expansion has."""
    tail = {f"tail 280-1280 bfloat16 {launch.name}": launch for launch in tail_launches(280, 1280, 256, 7, BF16)}
    stem = block_launches(BlockShape(32, 32, 16, 3, 1), 256, 112, BF16, False)
    raw = {f"raw input {launch.name}": launch for launch in stem if launch.name.startswith(("statistics", "apply_b"))}
    scored = {
        f"{kind} {described(shape)} bfloat16 {place}": launch
        for kind, segments in (("folded", 0), ("segmented", 8))
        for shape in (BlockShape(48, 288, 48, 5, 1), BlockShape(128, 768, 192, 3, 2))
        for place, launch in zip(
            ("expand", "depthwise", "project"), inference_launches(shape, 256, 14, BF16, segments), strict=True
        )
    }
    return tail | raw | scored


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


def check(capability: int, named: dict[str, Launch]) -> None:
    table = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets = table.setdefault(triton.__version__, {}) if WRITE else table.get(triton.__version__, {})
    for name, launch in named.items():
        found = compile_launch(launch, capability)
        key = f"sm_{capability} {name}"
        assert found.spills == 0, (key, found.spills)
        assert found.stack == 0, (key, found.stack)
        assert found.shared <= GPUS[capability].shared_memory, (key, found.shared)
        if "float32" not in name and launch.name.startswith(MATRIX):
            assert found.opcodes["HGMMA" if capability == 90 else "HMMA"] > 0, key
        values = measure(launch, found)
        if WRITE:
            budgets[key] = values
        for what, value in budgets.get(key, {}).items():
            assert values[what] <= SLACK * value, (key, what, values[what], value)
        if not WRITE and budgets:
            assert key in budgets, f"{key} has no budget; write one as the file's docstring says"
    if WRITE:
        BUDGETS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "shape", "size", "dtype", "only"), CASES)
def test_budget(capability: int, shape: BlockShape, size: int, dtype: torch.dtype, only: str) -> None:
    with meta_tensors_stand_for(GPUS[capability]):
        named = launches(shape, size, dtype, only)
    check(capability, named)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [90, 80])
def test_budget_of_the_tail_the_stem_and_scoring(capability: int) -> None:
    with meta_tensors_stand_for(GPUS[capability]):
        named = other_launches()
    check(capability, named)


def test_every_kernel_has_a_budget() -> None:
    """All that are defined in the modules of the Triton kernels, against the launches that are compiled here."""
    modules = [importlib.import_module(f"kernels.{path.stem}") for path in DIRECTORY.glob("triton_*.py")]
    defined = {k.fn.__name__ for module in modules for k in vars(module).values() if isinstance(k, CachedLaunches)}
    compiled = [launch for case in CASES for launch in launches(*case[1:]).values()] + [*other_launches().values()]
    assert len(defined) >= 15
    assert defined - {launch.name for launch in compiled} == set()


@pytest.mark.parametrize(("shape", "size"), mean_path())
def test_bytes_moved_stay_near_the_floor(shape: BlockShape, size: int) -> None:
    """Each kernel's arguments against its activations, each once; what is not counted: benchmarks/kernel_bytes.py."""
    for launch in block_launches(shape, 256, size, BF16):
        moved, _, floor = bytes_moved(launch)
        if floor:
            assert moved <= 1.1 * floor, (launch.name, moved, floor)
