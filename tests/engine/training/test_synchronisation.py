"""Between two log lines a training hands work to the device and never waits for it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.accelerator
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.distributed import Process
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.training.metrics import Meter
from bsnas.engine.training.network import NetworkTraining
from bsnas.engine.training.watch import Watch
from tests.engine.training.cases import make_trainer, tiny_config

READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2")
"""Operations of torch whose result the host waits for: item(), bool(), float() and sizes that values decide."""
METHODS = ("tolist", "cpu", "numpy", "__array__")
"""Methods that read a tensor on the host without such an operation."""


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU if the tensors were there."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Everything that makes the host wait, by name, except for what reads a log line or the notes of an earlier step.

    On a GPU `Watch` reads a copy on the host, whose event is a step old.
    """
    waits: Counter[str] = Counter()
    allowed = 0

    def counting(name: str, run: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            waits[name] += not allowed
            return run(*args, **named)

        return call

    def allowing(run: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            nonlocal allowed
            allowed += 1
            before = waits.copy()
            try:
                return run(*args, **named)
            finally:
                allowed -= 1
                waits.clear()
                waits.update(before)

        return call

    accelerator = type(deepspeed.accelerator.get_accelerator())
    with pytest.MonkeyPatch.context() as patch, Reads(waits):
        for owner, name in ((accelerator, "synchronize"), (torch.cuda, "synchronize")):
            patch.setattr(owner, name, counting(f"{owner.__name__}.{name}", getattr(owner, name)))
        for name in METHODS:
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        for owner, name in ((Watch, "_take"), (Meter, "read"), (Meter, "peek")):
            patch.setattr(owner, name, allowing(getattr(owner, name)))
        yield waits


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rounds_of_a_supernet(alone: Process, tmp_path: Path, precision: str) -> None:
    config = tiny_config(tmp_path, precision=precision)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    batches = trainer.batches()
    trainer.network.train()
    held = [next(batches) for _ in range(3 * trainer.space.max_live)]  # DALI's own handing over is not a training's
    with counted_waits() as waits:
        for _ in range(3):  # DeepSpeed's timers would begin after two steps
            trainer.make_steps(trainer.round(iter(held)))
    assert trainer.progress.rounds == 3
    assert not waits


def test_an_epoch_of_a_network(alone: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    network = Subnet(config.space, fair_round(config.space, 0, 0)[0])
    data = open_dataset(config.data, tmp_path / "split.json")
    trainer = NetworkTraining(network, config, tmp_path / "retrain", {"arch": "a"}, alone, data, {})
    held = list(trainer.loader.epoch(0))
    monkeypatch.setattr(trainer.loader, "epoch", lambda epoch, start: iter(held))
    monkeypatch.setattr(trainer, "save", lambda *, whole_epoch: None)
    with counted_waits() as waits:
        trainer.train_epoch()
    assert trainer.progress.passes == len(held) > 3
    assert not waits


def test_reads_are_counted() -> None:
    value = torch.ones(1)
    with counted_waits() as waits:
        value.item()
        bool(value)
        value.tolist()
        value.cpu()
        deepspeed.accelerator.get_accelerator().synchronize()
    assert waits.total() == 5, waits
