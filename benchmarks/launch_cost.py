"""What does a launch cost on the host? A training step of one block, of which only the host's part runs.

    python benchmarks/launch_cost.py
    python benchmarks/launch_cost.py --json launches.json

The kernels are compiled for an H100, and a stand-in takes the place of the driver, so this needs no GPU: what is timed
is what Python does before the driver's own launch. `host code` allocates outputs and chooses tiles; `Triton` adds its
own search for the compiled kernel, `cached` that of kernels/gpu/launch.py.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.host.script import write_figures
from bsnas.kernels.block import BlockShape
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.tools.ahead_of_time import block_step
from bsnas.kernels.tools.stand_in import stand_in_driver

SHAPE, BATCH, SIZE = BlockShape(40, 240, 40, 5, 1), 4, 14
REPEATS = 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    figures = measure() | provenance()
    for name in ("host code", "Triton", "cached"):
        print(f"{name:10} {figures[name]:7.1f} us a step")
    print(f"{figures['launches']} launches; a search costs Triton {figures['Triton, a launch']:.1f} us, "
          f"here {figures['cached, a launch']:.1f} us")  # fmt: skip
    write_figures(arguments.json, figures)


def measure() -> dict[str, Any]:
    """Microseconds of the host for a step of a block, least of many, the three in turn."""
    step = block_step(SHAPE, BATCH, SIZE, torch.bfloat16, device="cpu")

    def uncached(self: CachedLaunches, grid: tuple[int], *args: Any, **named: Any) -> None:
        self.fn[grid](*args, **named)

    def nothing(self: CachedLaunches, grid: tuple[int], *args: Any, **named: Any) -> None:
        pass

    ways: dict[str, Callable[..., None]] = {"host code": nothing, "Triton": uncached, "cached": CachedLaunches.launch}
    best = dict.fromkeys(ways, float("inf"))
    with stand_in_driver(90) as handed:
        sequences = []
        for launch in (uncached, CachedLaunches.launch, CachedLaunches.launch):
            handed.clear()
            with mock.patch.object(CachedLaunches, "launch", launch):
                step()
            sequences.append([(launched.grid, launched.kernel) for launched in handed])
        if sequences[0] != sequences[1] or sequences[1] != sequences[2]:
            raise AssertionError("cached launches differ from Triton's")
        for _ in range(REPEATS):
            for name, launch in ways.items():
                handed.clear()
                with mock.patch.object(CachedLaunches, "launch", launch):
                    started = time.perf_counter()
                    step()
                    best[name] = min(best[name], (time.perf_counter() - started) * 1e6)
    launches = len(sequences[0])
    each = {f"{name}, a launch": (best[name] - best["host code"]) / launches for name in ("Triton", "cached")}
    return {"launches": launches, **best, **each}


if __name__ == "__main__":
    main()
