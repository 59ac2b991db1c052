"""Test accuracy of networks that are trained from scratch, each with the same settings, and none of them twice."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import Dataset
from bsnas.engine.data.loading.evaluation_set import EvaluationSet, evaluation_set
from bsnas.engine.host.distributed import Process, entered_by_main, on_main
from bsnas.engine.host.locks import exclusive
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.runs.rundir import NetworkDir, read_json, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.space import Space
from bsnas.engine.training.network import NetworkTraining, measure_accuracy

_SETTINGS = ("epochs", "learning_rate", "batch_size")


@dataclass(frozen=True)
class TrainedAlone:
    """Trains with the retraining settings of `config`; results are kept in `directory`, one entry per network."""

    directory: Path
    config: RunConfig
    process: Process
    data: Dataset
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    @cached_property
    def test_images(self) -> EvaluationSet:
        return evaluation_set(self.data.open_test(), self.config.data)

    def all_top1(self, space: Space, archs: Sequence[Arch]) -> tuple[float, ...]:
        """Test top-1 of each. Those that another process has in training come last, so that several share the work."""
        for arch in archs:
            if not on_main(self.process, partial(_in_training, self.entry(space, arch)[0])):
                self.top1(space, arch)
        return tuple(self.top1(space, arch) for arch in archs)

    def top1(self, space: Space, arch: Arch) -> float:
        """Test top-1 of the released network of an architecture; an interrupted training continues."""
        directory, request = self.entry(space, arch)
        result = NetworkDir(directory).result_file
        known = on_main(self.process, lambda: read_json(result) if result.is_file() else {})
        if known.get("request") == request:
            return float(known["test_top1"])
        if self.process.is_main:
            Console(stderr=True).print(f"training alone: {arch}", highlight=False)
        torch.manual_seed(self.config.seed)
        top1 = self.train(Subnet(space, arch), request, directory)
        on_main(self.process, lambda: write_json(result, {"request": request, "test_top1": top1}))
        return top1

    def entry(self, space: Space, arch: Arch) -> tuple[Path, dict[str, object]]:
        """Where an architecture's training and result lie, and what was asked of it."""
        settings = {name: getattr(self.config.retrain, name) for name in _SETTINGS}
        request = {"arch": str(arch), "seed": self.config.seed, **settings}
        name = hashlib.sha256(str((request, space.to_json())).encode()).hexdigest()[:12]
        return self.directory / name, request

    def train(self, network: nn.Module, request: dict[str, object], directory: Path) -> float:
        """Train a network, from where it was interrupted, and test it. Returns top-1; `network` has the weights.

        What another process has in training there is waited for, and then taken over.
        """
        with entered_by_main(self.process, _alone_in(directory)):
            trainer = NetworkTraining(
                network, self.config, directory, request, self.process, self.data, {}, self.safety
            )
            trainer.train()
        return on_main(self.process, lambda: measure_accuracy(network, self.test_images, self.process.device).top1)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process trains in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a") as lock, exclusive(lock, directory / "lock", wait=True):
        yield


def _in_training(directory: Path) -> bool:
    """Does another process train in a directory at the moment?"""
    if not directory.is_dir():
        return False
    try:
        with open(directory / "lock", "a") as lock, exclusive(lock, directory / "lock", wait=False):
            return False
    except BlockingIOError:
        return True
