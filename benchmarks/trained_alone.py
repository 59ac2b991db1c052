"""Test accuracy of networks that are trained from scratch, each with the same settings, and none of them twice."""

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from engine.config import RunConfig, SafetyConfig
from engine.data import Dataset
from engine.distributed import Process, entered_by_main, on_main
from engine.evaluation_set import EvaluationSet, evaluation_set
from engine.rundir import read_json, write_json
from engine.space import Arch, Space
from engine.standalone import StandaloneTrainer, measure_accuracy
from engine.subnet import Subnet

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

    def top1(self, space: Space, arch: Arch) -> float:
        """Test top-1 of the released network of an architecture; an interrupted training continues."""
        settings = {name: getattr(self.config.retrain, name) for name in _SETTINGS}
        request = {"arch": str(arch), "seed": self.config.seed, **settings}
        directory = self.directory / hashlib.sha256(str((request, space.to_json())).encode()).hexdigest()[:12]
        result = directory / "result.json"
        with entered_by_main(self.process, _alone_in(directory)):
            known = on_main(self.process, lambda: read_json(result) if result.is_file() else {})
            if known.get("request") == request:
                return float(known["test_top1"])
            if self.process.is_main:
                Console(stderr=True).print(f"training alone: {arch}", highlight=False)
            torch.manual_seed(self.config.seed)
            top1 = self.train(Subnet(space, arch), request, directory)
            on_main(self.process, lambda: write_json(result, {"request": request, "test_top1": top1}))
            return top1

    def train(self, network: nn.Module, request: dict[str, object], directory: Path) -> float:
        """Train a network, from where it was interrupted, and test it. Returns top-1; `network` has the weights."""
        StandaloneTrainer(network, self.config, directory, request, self.process, self.data, {}, self.safety).train()
        return on_main(self.process, lambda: measure_accuracy(network, self.test_images, self.process.device).top1)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process trains in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
