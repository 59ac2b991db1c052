"""What does training cost on the host? A training step of one block, and a round of paths of the imagenet preset.

    python benchmarks/launch_cost.py
    python benchmarks/launch_cost.py --json launches.json

The block's kernels are compiled for an H100, and a stand-in takes the place of the driver, so this needs no GPU: what
is timed is what Python does before the driver's own launch. `host code` allocates outputs and chooses tiles; `Triton`
adds its own search for the compiled kernel, `cached` that of kernels/gpu/launch.py.

The round is the trainer's own, in bf16 through DeepSpeed, with as many paths, operations and parameters as the preset
has. Channels, images and batch are tiny and no kernel is launched, so that arithmetic does not count; the launches are
counted and reckoned at what the block's cost.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import argparse
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import repeat
from typing import Any
from unittest import mock

import torch

from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.config import SafetyConfig
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.host.distributed import start_process
from bsnas.engine.host.script import write_figures
from bsnas.engine.presets import preset
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.mobile import mobile_space
from bsnas.engine.training.supernet import SupernetTraining
from bsnas.kernels import training
from bsnas.kernels.block import BlockShape
from bsnas.kernels.gpu.launch import CachedLaunches
from bsnas.kernels.tools.ahead_of_time import block_step
from bsnas.kernels.tools.stand_in import stand_in_driver

SHAPE, BATCH, SIZE = BlockShape(40, 240, 40, 5, 1), 4, 14
REPEATS = 300
ROUNDS = 25
NARROW = (2, 4, 6)
"""Channels of every cluster in the round, in place of the preset's."""
PARTS = {
    "draw": "draw the paths",
    "forward": "forward, without launches",
    "loss": "loss",
    "backward": "backward, without launches",
    "meter": "meter",
    "prepare": "find the step's parameters",
    "step": "optimizer step",
    "other": "all else",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stand-in launches nothing, on tensors of the CPU
    arguments = parser.parse_args()
    figures = measure() | provenance()
    for name in ("host code", "Triton", "cached"):
        print(f"{name:10} {figures[name]:7.1f} us a step")
    print(f"{figures['launches']} launches; a search costs Triton {figures['Triton, a launch']:.1f} us, "
          f"here {figures['cached, a launch']:.1f} us")  # fmt: skip
    figures["round"] = found = measure_round(figures["cached, a launch"])
    print(f"a round of {found['paths']} paths, {found['parameters']} parameters, one process of one and of two:")
    for name, title in (PARTS | {"launches": f"{found['launches']} launches", "total": "together"}).items():
        print(f"{title:44} {found['one process'][name]:7.2f} {found['two processes'][name]:7.2f} ms")
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


def measure_round(launch_us: float) -> dict[str, Any]:
    """Milliseconds of the host for a round of paths, by its parts: of each the least of many rounds.

    `launch_us` is what a launch costs. The second process is one that has all its gradients reduced with nobody.
    """
    torch.set_num_threads(1)
    launches = 0

    def count(self: CachedLaunches, grid: tuple[int], *args: Any, **named: Any) -> None:
        nonlocal launches
        launches += 1

    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as place,
        mock.patch.object(CachedLaunches, "launch", count),
        mock.patch.object(training, "choose_backend", return_value="triton"),
        stand_in_driver(90),
    ):
        trainer = narrow_trainer(Path(place))
        for name, processes in (("one process", 1), ("two processes", 2)):
            trainer.optimization.world_size = processes
            rounds = [timed_round(trainer) for _ in range(ROUNDS)]
            parts = {part: 1e3 * min(times[part] for times in rounds) for part in PARTS}
            parts["launches"] = launches / len(rounds) * launch_us / 1e3
            figures[name] = parts | {"total": sum(parts.values())}
            figures["launches"], launches = launches // len(rounds), 0
    figures["paths"] = trainer.space.max_live
    figures["parameters"] = len(list(trainer.network.parameters()))
    return figures


def narrow_trainer(place: Path) -> SupernetTraining:
    """A trainer of the imagenet preset's settings, with all its operations, of few channels."""
    config = preset("imagenet")
    clusters = tuple(replace(cluster, channels=NARROW) for cluster in config.space.clusters)
    config = replace(
        config,
        space=mobile_space(
            clusters=clusters, resolution=32, classes=10, stem_channels=8, separable_channels=8, tail_channels=32
        ),
        data=DataConfig(source="digits", resolution=32),
        optimizer=replace(config.optimizer, batch_size=BATCH),
        precision="bf16",
    )
    run = RunDir(place / "run")
    run.path.mkdir()
    data = open_dataset(config.data, run.split_file)
    never = SafetyConfig(checkpoint_minutes=1e9, max_skipped=10**9)  # what no kernel has written may be no number
    return SupernetTraining(config, run, start_process(), data, {}, never)


def timed_round(trainer: SupernetTraining) -> dict[str, float]:
    """Seconds of this thread in a round, by the names of PARTS: other processes on its core do not count."""
    images = torch.zeros(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    batches = repeat((images, torch.zeros(BATCH, dtype=torch.int64)))
    times: defaultdict[str, float] = defaultdict(float)

    def timed(part: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return run(*args, **named)
            finally:
                times[part] += time.thread_time() - started

        return call

    places = (
        (trainer, "draw_round", "draw"), (trainer.optimization, "forward", "forward"), (trainer, "criterion", "loss"),
        (trainer.optimization, "backward", "backward"), (trainer.meter, "add", "meter"),
        (trainer, "_step_of", "prepare"), (trainer.optimization, "step", "step"),
    )  # fmt: skip
    trainer.network.train()
    with ExitStack() as patches:
        for owner, name, part in places:
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        started = time.thread_time()
        trainer.make_steps(trainer.round(batches))
        total = time.thread_time() - started
    times["other"] = total - sum(times.values())
    return times


if __name__ == "__main__":
    main()
