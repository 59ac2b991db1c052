"""Compile the kernels for GPUs that need not be here, and hold them to a checked-in budget (budgets.json).

Compute capability 8.0, 8.9, 9.0, 10.0 and 12.0. In bfloat16 every kernel of every operation of the presets, in training
and in scoring; float32 (and float16 for two of them), which have no table of tiles, for some blocks of ImageNet's; by
rule, and on an H100 with its table for every shape class of the paper's Table 1 as well.

All of them, minutes to half an hour of two cores, only where something has changed since budgets.json was recorded:
kernels, tiles, or Triton's version; and in `make kernels`. Else, of each kernel and capability, the code that takes the
most shared memory. After a deliberate change, `make budgets` records anew; what was compiled is kept in Triton's cache,
so it can be stopped and started again.

Budgets belong to a Triton version; under another one only what must hold everywhere is checked: tensor cores in the
16-bit matrix products, shared memory within the GPU's, no spills and no stack but on 10.0.
"""

import fcntl
import hashlib
import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests import ROOT

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bsnas.benchmarks.kernel_bytes import bytes_moved
from bsnas.benchmarks.parts.kernel.mean_path import PlacedBlock, mean_path, table_shapes
from bsnas.engine.presets import preset
from bsnas.engine.space.plan import Plan
from bsnas.engine.space.space import Space
from bsnas.kernels.block import BlockShape
from bsnas.kernels.gpu import configs
from bsnas.kernels.gpu.configs import H100, Gpu, meta_tensors_stand_for
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
WRITE = os.environ.get("BSNAS_KERNELS_COMPILED") == "record"
ALL = WRITE or os.environ.get("BSNAS_KERNELS_COMPILED") == "all"
A100 = Gpu("nvidia-a100", operands_in_registers=True, multiprocessors=108, shared_memory=163 * 1024)
RTX_4090 = A100._replace(name="nvidia-geforce-rtx-4090", multiprocessors=128, shared_memory=99 * 1024)
RTX_5090 = RTX_4090._replace(name="nvidia-geforce-rtx-5090", multiprocessors=170)
B200 = H100._replace(name="nvidia-b200", multiprocessors=148)
HOPPER = H100._replace(name="another Hopper")  # has no table
MATRIX = (
    "pointwise_forward",
    "pointwise_inference",
    "project_backward",
    "expand_backward",
    "input_gradient",
    "weight_gradient",
)
PRODUCT = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
"""The instruction of a 16-bit matrix product."""
TO_BE_TUNED = 100
"""Takes Hopper's tiles, some of which spill with tcgen05: it leaves a row of sums to a thread. Held to their budget."""
SLACK = 1.1
SHARES = 24

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Workload(NamedTuple):
    """What a training and a scoring of some blocks of a space launch."""

    space: Space
    batch: int
    blocks: list[PlacedBlock]


def every_block(space: Space) -> Iterator[PlacedBlock]:
    """Every operation of a supernet, once for each shape."""
    for i, size in enumerate(space.input_sizes()[:-1]):
        for op in space.live[i]:
            for inputs in space.supernet_inputs(i, op.channels):
                yield PlacedBlock(shape_of(space.supernet_plan(i, inputs, op)), size)


def shape_of(plan: Plan) -> BlockShape:
    """Of an inverted residual or a separable block."""
    return BlockShape(plan.layers[0].inputs, plan.layers[-1].inputs, plan.layers[-1].outputs, plan.kernel, plan.stride)


IMAGENET, DIGITS, FASHION = (preset(name).space for name in ("imagenet", "digits", "fashion-mnist"))
PRESETS = [
    Workload(space, batch, list(dict.fromkeys(every_block(space))))
    for space, batch in ((IMAGENET, 256), (DIGITS, 64), (FASHION, 128))
]
LARGE_KERNELS = {  # one block for each kernel size, stride and map; table_shapes has kernel 3
    (kernel, shape.stride, size): PlacedBlock(replace(shape, kernel=kernel), size)
    for kernel in (5, 7)
    for shape, size in table_shapes()
}
TABLE = [Workload(IMAGENET, 256, [*mean_path(), *table_shapes(), *LARGE_KERNELS.values()])]
SOME = [  # every kernel size and stride, narrow and wide, and another activation
    Workload(IMAGENET, 256, [
        *mean_path()[2:7], LARGE_KERNELS[5, 2, 28], mean_path()[-1],
        PlacedBlock(replace(mean_path()[3].shape, activation="relu"), mean_path()[3].size),
    ])
]  # fmt: skip
COMPILED = [
    (90, H100, BF16, TABLE),
    *((capability, gpu, BF16, PRESETS) for capability, gpu in (
        (80, A100), (89, RTX_4090), (90, HOPPER), (100, B200), (120, RTX_5090),
    )),
    *((capability, gpu, FP32, SOME) for capability, gpu in (
        (80, A100), (89, RTX_4090), (90, HOPPER), (100, B200), (120, RTX_5090),
    )),
    (80, A100, FP16, SOME),
    (90, HOPPER, FP16, SOME),
]  # fmt: skip


class Compiled(NamedTuple):
    launch: Launch
    capability: int
    gpu: Gpu
    dtype: torch.dtype


def launches(dtype: torch.dtype, workload: Workload) -> Iterator[Launch]:
    space, batch, blocks = workload
    for shape, size in blocks:
        yield from block_launches(shape, batch, size, dtype)
        for segments in (0, 8):
            yield from inference_launches(shape, batch, size, dtype, segments)
    for inputs in space.tail_inputs:
        yield from tail_launches(inputs, space.classifier_inputs(inputs), batch, blocks[-1].size, dtype)
    yield from block_launches(shape_of(space.stem_plans[-1]), batch, space.input_sizes()[0], dtype, False)


@cache
def compiled() -> dict[str, Compiled]:
    """All different codes, by what budgets call them: tiles to read, and a digest of all else that they depend on."""
    found = {}
    for capability, gpu, dtype, workloads in COMPILED:
        with meta_tensors_stand_for(gpu):
            for launch in (launch for workload in workloads for launch in launches(dtype, workload)):
                digest = hashlib.sha256(repr(specialisation(launch)).encode()).hexdigest()[:8]
                tiles = "x".join(str(v) for k, v in launch.arguments.items() if re.fullmatch("B[A-Z]|BLOCK|TW", k))
                options = " ".join(f"{name.removeprefix('num_')} {value}" for name, value in launch.options.items())
                name = f"sm_{capability} {str(dtype).removeprefix('torch.')} {launch.name} {tiles} {options} {digest}"
                found.setdefault(name, Compiled(launch, capability, gpu, dtype))
    return found


def fingerprint() -> str:
    """Of all that compiled kernels depend on: their sources without imports, tables of tiles, Triton's version."""
    digest = hashlib.sha256(triton.__version__.encode())
    sources = [path for path in DIRECTORY.glob("[!_]*.py") if path.name not in ("block.py", "launch.py")]
    for path in (*sorted(sources), *sorted(configs.DIRECTORY.glob("*.json"))):
        lines = path.read_text().splitlines()
        digest.update("\n".join(line for line in lines if not line.startswith(("from ", "import "))).encode())
    return digest.hexdigest()[:16]


class Budgets(NamedTuple):
    """budgets.json."""

    fingerprint: str
    triton: str
    rows: dict[str, dict[str, float]]

    @classmethod
    def read(cls) -> "Budgets":
        return cls(**json.loads(BUDGETS.read_text()))

    def write(self) -> None:
        """JSON with a launch to a line."""
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(self.rows[name])}" for name in sorted(self.rows))
        head = f'{{"fingerprint": "{self.fingerprint}", "triton": "{self.triton}", "rows": {{\n'
        BUDGETS.write_text(f"{head}{rows}\n}}}}\n")


def record(rows: dict[str, dict[str, float]]) -> None:
    """Add rows to budgets.json, which other processes do as well; rows of other kernels or tiles go."""
    with open(__file__) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = Budgets.read()
        kept = before.rows if before.fingerprint == fingerprint() else {}
        every = {name: row for name, row in (kept | rows).items() if name in compiled()}
        Budgets(fingerprint(), triton.__version__, every).write()


def sample(every: dict[str, Compiled], budgets: Budgets) -> list[str]:
    """All names where something has changed, or all are asked for; else the largest of each kernel and capability."""
    if ALL or budgets.fingerprint != fingerprint() or not every.keys() <= budgets.rows.keys():
        return list(every)
    largest: dict[tuple[int, str], str] = {}
    for name in sorted(every, key=lambda name: (budgets.rows[name]["shared"], budgets.rows[name]["registers"], name)):
        largest[every[name].capability, every[name].launch.name] = name
    return list(largest.values())


def loop_instructions(sass: str) -> int:
    """Instructions of the longest loop: what a depthwise kernel issues for a row of outputs a thread."""
    longest = 0
    for at, target in re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*BRA[^;]*?(0x[0-9a-f]+)", sass):
        if int(target, 16) < int(at, 16):
            longest = max(longest, (int(at, 16) - int(target, 16)) // 16 + 1)
    return longest


def measure(of: Compiled, found: Resources) -> dict[str, float]:
    launch = of.launch
    values: dict[str, float] = {
        "registers": found.registers,
        "shared": found.shared,
        "instructions": found.instructions,
    }
    if of.capability == TO_BE_TUNED:
        values["spills"] = found.spills
    if launch.name.startswith("depthwise_forward"):
        per_thread = launch.arguments["BT"] * launch.arguments["BC"] // (32 * launch.options["num_warps"])
        outputs = launch.arguments["TW"] * max(per_thread, 1)
        values["instructions_per_output"] = round(loop_instructions(found.sass) / outputs, 1)
    return values


def faults(name: str, of: Compiled, found: Resources) -> Iterator[str]:
    """What is wrong with a launch once compiled, whatever its budget."""
    if (found.spills or found.stack) and of.capability != TO_BE_TUNED:
        yield f"{name}: {found.spills} spills, a stack of {found.stack} bytes"
    if found.shared > of.gpu.shared_memory:
        yield f"{name}: {found.shared} bytes of shared memory"
    instruction = PRODUCT[of.capability]
    if of.dtype != FP32 and of.launch.name.startswith(MATRIX) and not found.opcodes[instruction]:
        yield f"{name}: no {instruction}"


def excesses(name: str, values: dict[str, float], budget: dict[str, float] | None) -> Iterator[str]:
    """Where a launch takes more than its budget, or that it has none."""
    if budget is None:
        yield f"{name}: no budget; record one with `make budgets`"
        return
    for what, value in budget.items():
        if values[what] > SLACK * value:
            yield f"{name}: {what} {values[what]}, budget {value}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("share", range(SHARES))
def test_every_launch_compiles_without_spills_within_its_budget(share: int) -> None:
    every, budgets = compiled(), Budgets.read()
    wrong, rows = [], {}
    for name in sample(every, budgets)[share::SHARES]:
        of = every[name]
        found = compile_launch(of.launch, of.capability)
        wrong += faults(name, of, found)
        rows[name] = measure(of, found)
        if not WRITE and budgets.triton == triton.__version__:
            wrong += excesses(name, rows[name], budgets.rows.get(name))
    if WRITE:
        record(rows)
    assert not wrong, "\n".join(wrong)


def test_what_is_compiled_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel for every capability, few of each; all, where something has."""
    monkeypatch.setitem(globals(), "ALL", False)
    every = compiled()
    rows = {name: {"shared": len(name), "registers": 1.0} for name in every}
    recorded = Budgets(fingerprint(), triton.__version__, rows)
    few = sample(every, recorded)
    kinds = {(of.capability, of.launch.name) for of in every.values()}
    assert {(every[name].capability, every[name].launch.name) for name in few} == kinds
    assert len(few) == len(kinds) < 100 < len(every) / 10
    assert sample(every, recorded._replace(fingerprint="of other kernels")) == list(every)
    assert sample(every, recorded._replace(rows={})) == list(every)


def test_processes_record_together_and_what_is_of_other_kernels_goes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(globals(), "BUDGETS", tmp_path / "budgets.json")
    first, second, *_ = compiled()
    Budgets("of other kernels", "0", {first: {"shared": 1}, second: {"shared": 1}}).write()
    record({first: {"shared": 2}})
    assert Budgets.read() == (fingerprint(), triton.__version__, {first: {"shared": 2}})
    record({second: {"shared": 3}, "no code of ours": {"shared": 4}})
    assert Budgets.read().rows == {first: {"shared": 2}, second: {"shared": 3}}


def test_budgets_are_of_what_is_compiled() -> None:
    budgets = Budgets.read()
    if budgets.fingerprint == fingerprint():
        assert set(budgets.rows) == set(compiled()), "record with `make budgets`"


def test_a_change_of_a_kernel_a_table_or_triton_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(DIRECTORY, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = fingerprint()
    monkeypatch.setitem(globals(), "DIRECTORY", copy)
    monkeypatch.setattr(configs, "DIRECTORY", copy / "configs")
    assert fingerprint() == before
    seen = {before}
    for name in ("weights.py", "configs.py", "configs/nvidia-h100.json", "configs/nvidia-a100.json"):
        with open(copy / name, "a") as file:
            file.write(" ")
        seen.add(fingerprint())
    monkeypatch.setattr(triton, "__version__", "0")
    seen.add(fingerprint())
    assert len(seen) == 6
    (copy / "launch.py").write_text("")  # of no kernel
    assert fingerprint() in seen


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
        for _, gpu, dtype, workloads in COMPILED:
            if gpu.name == name:
                with meta_tensors_stand_for(gpu):
                    for workload in workloads:
                        list(launches(dtype, workload))
        named = {shape_class for entries in table.values() for shape_class in entries}
        assert len(named) > 50
        assert named <= asked, (name, named - asked)


def test_every_kernel_is_compiled() -> None:
    """All that are defined in the modules of the Triton kernels."""
    modules = [importlib.import_module(f"bsnas.kernels.gpu.{path.stem}") for path in DIRECTORY.glob("[!_]*.py")]
    defined = {k.fn.__name__ for module in modules for k in vars(module).values() if isinstance(k, CachedLaunches)}
    assert len(defined) >= 15
    for capability, dtype in {(capability, dtype) for capability, _, dtype, _ in COMPILED}:
        names = {of.launch.name for of in compiled().values() if (of.capability, of.dtype) == (capability, dtype)}
        fused = {"expand_backward_kernel"} if dtype == FP32 else set()  # whose float32 sums would not fit in registers
        shared = {of.launch.name for of in compiled().values() if of.capability == capability}  # the same for any dtype
        once = ("finalize", "reduce", "_reduce")
        assert defined - fused <= names | {n for n in shared if n.startswith(once)}, (capability, dtype)
    assert {capability for capability, _, _, _ in COMPILED} == set(PRODUCT)


def test_no_integer_is_specialised() -> None:
    """Counts of images, rows and channels would multiply the codes; what loads need to know is in ALIGN."""
    for of in compiled().values():
        for parameter in of.launch.fn.params:
            if type(of.launch.arguments[parameter.name]) is int:
                assert parameter.is_constexpr or parameter.do_not_specialize, (of.launch.name, parameter.name)


def test_tiles_are_estimated_to_fit_where_they_are_taken() -> None:
    """Also those of a table, on a GPU with less shared memory than the one that it was measured on."""
    wide = torch.empty(256 * 14 * 14, 240, device="meta", dtype=BF16)
    with meta_tensors_stand_for(H100):
        assert configs.expand_backward_config(wide, 240, 80) == (16, 128, 64, 8, 3, 1)
    with meta_tensors_stand_for(H100._replace(shared_memory=99 * 1024)):
        assert configs.expand_backward_config(wide, 240, 80) == (16, 128, 64, 8, 2, 1)


def test_what_a_gpu_is_called_and_which_products_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are of one model; only majors 9 to 11 have products that read shared memory."""
    names = {
        "NVIDIA H100 80GB HBM3": "nvidia-h100",
        "NVIDIA A100-SXM4-80GB": "nvidia-a100",
        "NVIDIA GeForce RTX 3080": "nvidia-geforce-rtx-3080",
        "NVIDIA GeForce RTX 4070 Ti SUPER": "nvidia-geforce-rtx-4070",
        "NVIDIA GeForce RTX 5090": "nvidia-geforce-rtx-5090",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition": "nvidia-rtx-pro-6000",
        "NVIDIA Thor": "nvidia-thor",
    }
    assert {name: configs.model(name) for name in names} == names
    for major, in_registers in {8: True, 9: False, 10: False, 11: False, 12: True}.items():
        properties = SimpleNamespace(
            name="NVIDIA X1", major=major, multi_processor_count=1, shared_memory_per_block_optin=101376
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        configs._cuda.cache_clear()
        gpu = configs.gpu_of(torch.device("cuda", 0))
        assert gpu == ("nvidia-x1", in_registers, 1, 101376)
    configs._cuda.cache_clear()


@pytest.mark.parametrize(("shape", "size"), mean_path())
def test_bytes_moved_stay_near_the_floor(shape: BlockShape, size: int) -> None:
    """Each kernel's arguments against its activations, each once; what is not counted: benchmarks/kernel_bytes.py."""
    for launch in block_launches(shape, 256, size, BF16):
        moved, _, floor = bytes_moved(launch)
        if floor:
            assert moved <= 1.1 * floor, (launch.name, moved, floor)
