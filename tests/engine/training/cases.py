"""A supernet training small enough for tests: real digits, four blocks, a few seconds an epoch."""

import json
from pathlib import Path
from typing import Any

from bsnas.engine.config import OptimizerConfig, RetrainConfig, RunConfig, SamplingConfig, ShrinkConfig
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.host.distributed import Process
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster
from bsnas.engine.training.metrics import CLOCK_VALUES
from bsnas.engine.training.supernet import SupernetTraining


def tiny_space() -> Space:
    """Four blocks, a one-block cluster in the middle, two channel options each."""

    def cluster(blocks: int, channels: tuple[int, ...], stride: int) -> Cluster:
        return mobile_cluster(blocks=blocks, kernels=(3, 5), expansions=(2,), channels=channels, stride=stride)

    return mobile_space(
        resolution=16,
        classes=10,
        stem_channels=8,
        stem_stride=2,
        separable_channels=4,
        tail_channels=32,
        clusters=(cluster(2, (8, 12), 2), cluster(1, (12, 16), 1), cluster(1, (16, 24), 2)),
    )


def tiny_config(cache: Path, **changes: Any) -> RunConfig:
    """Three epochs of digits with one shrink step after the second."""
    settings: dict[str, Any] = {
        "preset": "tiny",
        "space": tiny_space(),
        "data": DataConfig(source="digits", resolution=16, val_per_class=5, cache_dir=str(cache)),
        "sharing": "nested",
        "sampling": SamplingConfig(update="path", batches="fresh"),
        "optimizer": OptimizerConfig(batch_size=24, learning_rate=0.1, warmup_epochs=1),
        "shrink": ShrinkConfig(first_epochs=2, interval_epochs=1, keep=(2,), models_per_operation=3),
        "retrain": RetrainConfig(epochs=2, learning_rate=0.1, batch_size=128),
    }
    return RunConfig(**{**settings, **changes})


def make_trainer(
    run: RunDir, config: RunConfig, process: Process, overrides: dict[str, Any] | None = None
) -> SupernetTraining:
    """A trainer from the start or from the run's newest checkpoint."""
    return SupernetTraining(config, run, process, open_dataset(config.data, run.split_file), overrides or {})


def metrics(run: RunDir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK_VALUES} for line in lines]
