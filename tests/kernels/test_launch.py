"""Cached launches hand the driver what Triton's own would, for whatever arguments Triton compiles anew."""

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl

from bsnas.kernels.gpu import launch
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.tools.stand_in import Handed, stand_in_driver


@triton.jit
def scale_kernel(x, shift, y, M, factor, SIZE: tl.constexpr, SHIFTED: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = tl.load(x + at, mask=at < M, other=0.0).to(tl.float32) * factor
    if SHIFTED:
        value += tl.load(shift + at, mask=at < M, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < M)


@pytest.fixture
def handed() -> Iterator[list[Handed]]:
    with stand_in_driver(90) as handed:
        yield handed
        scale_kernel.device_caches.clear()  # kernels are unloaded by the driver that loaded them
        gc.collect()


def arguments(**other: Any) -> dict[str, Any]:
    x = torch.zeros(64)
    return {"x": x, "shift": x, "y": x, "M": 48, "factor": 2.0, "SIZE": 16, "SHIFTED": True, "num_warps": 1} | other


VARIATIONS = {
    "as it is": {},
    "another grid": {"grid": (3,)},
    "bfloat16": {"y": torch.zeros(64, dtype=torch.bfloat16)},
    "an address that 16 does not divide": {"x": torch.zeros(65)[1:]},
    "a number that 16 does not divide": {"M": 50},
    "one, which Triton takes for a constant": {"M": 1},
    "more than 32 bits": {"M": 2**33},
    "another factor": {"factor": 0.5},
    "nothing in place of a tensor": {"shift": None, "SHIFTED": False},
    "another constexpr": {"SIZE": 32},
    "another number of warps": {"num_warps": 2},
}


@pytest.mark.slow
def test_the_driver_gets_the_same_kernel_and_arguments(handed: list[Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    """First and later launches of every variation, in an order in which a key too coarse would find another's."""
    cached, asked = CachedLaunches(scale_kernel), 0
    original = type(scale_kernel).run

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal asked
        asked += 1
        return original(*args, **named)

    monkeypatch.setattr(type(scale_kernel), "run", counted)
    for round_number in range(2):
        for name, variation in VARIATIONS.items():
            given = arguments(**variation)
            grid = given.pop("grid", (4,))
            scale_kernel[grid](**given)
            x, shift, y, m, factor = (given.pop(key) for key in ("x", "shift", "y", "M", "factor"))
            before = asked
            cached[grid](x, shift, y, m, factor, **given)
            theirs, ours = handed[-2:]
            assert (ours.grid, ours.kernel) == (theirs.grid, theirs.kernel), name
            assert all(
                mine is other or mine == other for mine, other in zip(ours.arguments, theirs.arguments, strict=True)
            ), name
            if round_number == 1:
                assert asked == before, f"{name}: Triton was asked again"
    assert len({launched.kernel for launched in handed}) >= 7


def test_the_kept_kernels_stay_bounded(handed: list[Handed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEPT", 2)
    cached, x = CachedLaunches(scale_kernel), torch.zeros(64)
    for m in (16, 32, 48, 64, 16):
        cached[(4,)](x, x, x, m, 2.0, SIZE=16, SHIFTED=True, num_warps=1)
        assert len(cached._found) <= 2
    assert [launched.arguments[3] for launched in handed] == [16, 32, 48, 64, 16]
