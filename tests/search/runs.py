"""A run directory with a small untrained supernet, for tests of what comes after training."""

from dataclasses import replace
from pathlib import Path

import torch

from bsnas.engine.checkpoints.checkpoint import write_checkpoint
from bsnas.engine.checkpoints.manifest import Manifest, Progress
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.presets import preset, with_space
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.space import Space


def small_space() -> Space:
    """Four blocks at 16x16; 5184 architectures of 19 to 61 thousand MACs."""
    return mobile_space(
        resolution=16,
        classes=10,
        stem_channels=4,
        separable_channels=4,
        tail_channels=16,
        clusters=(
            mobile_cluster(blocks=2, kernels=(3, 5), expansions=(2, 3), channels=(4, 6, 8), stride=2),
            mobile_cluster(blocks=2, kernels=(3, 5, 7), expansions=(2, 3), channels=(8, 12, 16), stride=2),
        ),
    )


def untrained_run(path: Path, space: Space | None = None) -> RunDir:
    """A digits run that has one checkpoint of random weights, as if it had been trained."""
    space = space or small_space()
    config = with_space(replace(preset("digits"), data=DataConfig(source="digits", resolution=16)), space)
    run = RunDir.create(path, config)
    torch.manual_seed(0)
    supernet = Supernet(space, config.sharing)
    state = {"space": space.to_json(), "supernet": supernet.state_dict()}
    write_checkpoint(run.checkpoints, Manifest(progress=Progress(epoch=1), kept=True), state)
    return run
