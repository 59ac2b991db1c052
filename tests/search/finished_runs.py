"""Run directories as finished trainings and searches leave them, made up without training; no torch."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bsnas.engine.config import OptimizerConfig, RunConfig, ShrinkConfig, to_json
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.runs.facts import Row
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import fair_archs, uniform_arch
from bsnas.engine.space.shrink import importance, importance_to_json, shrink
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster
from bsnas.search.latency_tables.model import LatencyModel, PartCost
from bsnas.search.latency_tables.network_parts import PartTable
from bsnas.search.latency_tables.timings import LatencyContext


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a made-up run holds."""

    first_epochs: int = 6
    interval_epochs: int = 3
    models_per_operation: int = 6
    population: int = 12
    generations: int = 4


SMALL = Size()
PAPER = Size(first_epochs=120, interval_epochs=40, models_per_operation=200, population=75, generations=21)
"""The paper's numbers: 3600 + 1800 + 1000 subnets scored by the shrink steps, 1575 by the search."""


def small_space() -> Space:
    """Three clusters; one of a single block, with another number of channel options."""

    def cluster(blocks: int, channels: tuple[int, ...], stride: int) -> Cluster:
        return mobile_cluster(blocks=blocks, kernels=(3, 5), expansions=(2, 4), channels=channels, stride=stride)

    return mobile_space(
        resolution=16, classes=10, stem_channels=8, separable_channels=4, tail_channels=32,
        clusters=(cluster(2, (8, 12, 16), 2), cluster(2, (16, 24), 2), cluster(1, (24, 32, 40), 1)),
    )  # fmt: skip


def configuration(space: Space, size: Size, **changes: Any) -> Row:
    """What config.json holds, as engine/config.py writes it."""
    data = DataConfig(resolution=space.resolution)
    shrink = ShrinkConfig(first_epochs=size.first_epochs, interval_epochs=size.interval_epochs)
    optimizer = OptimizerConfig(batch_size=64, learning_rate=0.1)
    config = RunConfig(preset="made-up", space=space, data=data, shrink=shrink, optimizer=optimizer)
    return to_json(replace(config, **changes))


def quality(arch: Arch, rng: random.Random) -> float:
    """A top-1 that prefers large kernels and expansions, with noise."""
    gain = sum(op.kernel + op.expansion for op in arch.flat_blocks) / (13 * len(arch.flat_blocks))
    return round(min(1.0, 0.45 + 0.2 * gain + rng.gauss(0, 0.01)), 4)


def write(file: Path, data: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


def finished_run(path: Path, space: Space, size: Size = SMALL, *, seed: int = 0, **changes: Any) -> Path:
    """A whole run: training, three shrink steps, search, retraining, latency, ranking and commands."""
    rng = random.Random(seed)
    write(path / "config.json", configuration(space, size, seed=seed, **changes))
    last = train(path, space, size, rng)
    best = search(path, last, size, rng)
    write(path / "retrain/result.json", {**best, "test_top1": 0.74, "test_top5": 0.92, "test_images": 500})
    lines = [{"kind": "epoch", "epoch": e, **epoch_values(e, 5, rng)} for e in range(1, 6)]
    write_lines(path / "retrain/metrics.jsonl", lines)
    latency(path, space)
    archs = [
        {"arch": best["arch"], "one_shot": 0.6 + i / 100, "stand_alone": 0.7 + (i + i % 3) / 100} for i in range(9)
    ]
    write(path / "ranking/ranking.json", {"kendall_tau": 0.83, "confidence_interval": [0.4, 1.0], "archs": archs})
    commands(path)
    return path


def train(path: Path, space: Space, size: Size, rng: random.Random) -> Space:
    """Epochs, probes and shrink steps; returns the last space."""
    total = size.first_epochs + 3 * size.interval_epochs
    steps = {size.first_epochs + i * size.interval_epochs: (i + 1, keep) for i, keep in enumerate((9, 5, 3))}
    entries: list[Row] = []
    for epoch in range(1, total + 1):
        entries.append({"kind": "epoch", "epoch": epoch, **epoch_values(epoch, total, rng)})
        if epoch in steps:
            number, keep = steps[epoch]
            entries.append(probe(space, epoch, f"before step {number}", rng))
            space = shrink_step(path, space, number, keep, size, rng)
            entries.append({"kind": "shrink", "epoch": epoch, "step": number})
            entries.append(probe(space, epoch, f"after step {number}", rng))
    entries.append(probe(space, total, "final", rng))
    write_lines(path / "metrics.jsonl", entries)
    return space


def epoch_values(epoch: int, total: int, rng: random.Random) -> Row:
    share = epoch / total
    return {
        "loss": 2.3 * (1 - share) + 0.1 * rng.random(), "top1": 0.1 + 0.6 * share, "seconds": 12.5,
        "images_per_s": 900 + 60 * rng.random(), "data_wait_share": 0.05 * rng.random(),
        "learning_rate": 0.1 * (1 - share), "time": 1.8e9 + epoch,
    }  # fmt: skip


def probe(space: Space, epoch: int, when: str, rng: random.Random) -> Row:
    top1 = sorted(quality(uniform_arch(space, rng), rng) + epoch / 5000 for _ in range(20))
    return {"kind": "probe", "epoch": epoch, "when": when, "top1": top1, "median": (top1[9] + top1[10]) / 2}


def shrink_step(path: Path, space: Space, number: int, keep: int, size: Size, rng: random.Random) -> Space:
    archs = fair_archs(space, number, space.max_live * size.models_per_operation)
    top1 = [quality(arch, rng) for arch in archs]
    ratios = importance(space, archs, top1)
    models = [{"arch": str(arch), "top1": value} for arch, value in zip(archs, top1, strict=True)]
    write(
        path / f"shrink/step-{number}.json",
        {"keep": keep, "models": models, "importance": importance_to_json(ratios)},
    )
    after = shrink(space, ratios, keep)
    write(path / f"spaces/step-{number}.json", after.to_json())
    return after


def search(path: Path, space: Space, size: Size, rng: random.Random) -> Row:
    """Generations of random architectures with their front; returns the best row."""
    costs = CostModel(space)
    generations = []
    for number in range(size.generations):
        rows = []
        for _ in range(size.population):
            arch = uniform_arch(space, rng)
            macs, params = costs.macs_and_params(arch)
            top1 = quality(arch, rng) + 0.002 * number
            rows.append({"arch": str(arch), "macs": macs, "params": params, "top1": top1, "top5": 0.9, "loss": 1.2})
        generations.append(rows)
    everything = sorted((row for rows in generations for row in rows), key=lambda row: (row["macs"], -row["top1"]))
    front: list[Row] = []
    for row in everything:
        if not front or row["top1"] > front[-1]["top1"]:
            front.append(row)
    settings = {"population": size.population, "iterations": size.generations - 1}
    request = {"limits": {"macs": "macs <= 465M"}, "evolution": settings}
    write(path / "search/macs-465M-seed0-0.json", {"request": request, "scored_by": {}, "generations": generations})
    write(path / "search/pareto.json", front)
    write(path / "search/best.json", {**front[-1], "limits": request["limits"]})
    return front[-1]


def latency(path: Path, space: Space) -> None:
    rows: list[Row] = []
    for backend in ("torch-cpu", "onnxruntime-cpu"):
        for batch in (1, 8):
            times = {"p50_ms": 1.5 * batch, "p90_ms": 1.7 * batch, "p99_ms": 2.5 * batch, "images_per_s": 640.0}
            row = {"network": "retrained", "backend": backend, "precision": "fp32", "batch": batch, **times}
            rows.append({**row, "max_abs_error": 1e-6, "top1_agreement": 1.0, "hardware": "a processor"})
    rows.append({"network": "retrained", "backend": "tensorrt", "why": "tensorrt is not installed"})
    write(path / "latency/latency.json", {"rows": rows, "engines": []})
    context = LatencyContext(
        backend="onnxruntime-cpu", device="a processor", versions="onnxruntime 1.32", batch=8, precision="fp32",
        reference="c8",
    )  # fmt: skip
    costs = {
        str(part): PartCost(ms=0.01 * number, timed_ms=0.01 * number, spread_ms=0.001, visits=9)
        for number, part in enumerate(PartTable(space).all_parts(), start=1)
    }
    model = LatencyModel(
        context=context, space=space.fingerprint, correction="none", offset_ms=0.1, parts=costs, errors={"mape": 0.02}
    )
    model.save(RunDir(path).latency_table(context.backend, context.batch, context.precision))


def commands(path: Path) -> None:
    entries: list[Row] = []
    for script, seconds in (("train", 3600.0), ("evolve", 240.0), ("retrain", 900.0)):
        who = {"script": script, "pid": 1, "host": "elsewhere", "time": "2026-01-01T00:00:00+00:00"}
        versions = {"python": "3.11.7", "torch": "2.14.1"}
        facts = {"commit": "0123456789", "versions": versions, "hardware": "a processor", "processes": 1}
        entries.append({"event": "start", **who, "command": f"{script}.py --run <here>", **facts})
        ends = {"outcome": "done", "seconds": seconds, "joules_of_main_device": 100 * seconds}
        entries.append({"event": "end", **who, **ends})
    write_lines(path / "commands.jsonl", entries)


def write_lines(file: Path, entries: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
