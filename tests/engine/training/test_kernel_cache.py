"""The processes of a machine compile each its share of the kernels, and a training launches no others."""

import gc
import os
from typing import Any

import pytest
import torch
from torch import nn

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from bsnas.engine.host.distributed import Process
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.presets import preset
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.training import kernel_cache
from bsnas.kernels import training
from bsnas.kernels.block import BlockShape
from bsnas.kernels.tools import ahead_of_time
from bsnas.kernels.tools.ahead_of_time import Launch, block_step, compile_share, recorded_launches, specialisation
from bsnas.kernels.tools.stand_in import stand_in_driver

CPU = torch.device("cpu")


def process(local_rank: int = 0, rank: int = 0) -> Process:
    return Process(rank=rank, world_size=2, local_rank=local_rank, device=CPU)


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host code of the Triton backend runs on tensors of the CPU; whoever launches must be recorded."""
    for module in (kernel_cache, training):
        monkeypatch.setattr(module, "choose_backend", lambda x, backend=None: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_the_ranks_of_a_machine_share_all_kernels_of_a_training(
    on_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = preset("digits")
    supernet = Supernet(config.space, config.sharing).train()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    compiled: list[Any] = []
    waited = []
    paths = [(arch,) for arch in fair_round(config.space, 0, 0)]
    monkeypatch.setattr(torch.distributed, "barrier", lambda: waited.append(len(compiled)))
    monkeypatch.setattr(
        ahead_of_time.triton, "compile", lambda source, **named: compiled.append((source.hash(), named))
    )
    for rank in range(2):
        monkeypatch.setenv("LOCAL_SIZE", "2")
        assert not kernel_cache.compile_kernels(supernet, paths, (4, 3, 16, 16), process(rank, rank), torch.bfloat16)
        assert all(parameter.grad is None for parameter in supernet.parameters())
    after = supernet.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    codes = [code for code, _ in compiled]
    assert len(codes) == len(set(codes)) == waited[1], "a code that both compile"
    assert abs(waited[1] - 2 * waited[0]) <= 1

    def another_round() -> None:
        x = torch.zeros(4, 3, 16, 16)
        for arch in fair_round(config.space, 7, 5):
            with torch.autocast("cpu", torch.bfloat16):
                supernet(x, arch).float().sum().backward()

    recorded = recorded_launches(another_round)
    tensors = [value for launch in recorded for value in launch.arguments.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(tensor.device.type == "meta" for tensor in tensors), "a whole round would fill a GPU"
    launched = {specialisation(launch): launch for launch in recorded}
    assert len(launched) == len(codes)
    assert {ahead_of_time.source(launch).hash() for launch in launched.values()} == set(codes)
    assert {named["target"].arch for _, named in compiled} == {90}


def test_without_triton_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "barrier", lambda: pytest.fail("waited"))
    monkeypatch.setattr(ahead_of_time, "recorded_launches", lambda run: pytest.fail("recorded"))
    assert kernel_cache.compile_kernels(nn.Identity(), [()], (4, 3, 16, 16), process(), torch.float32) == []


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """In Triton's cache on disk, under the very key that it looks for."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    step = block_step(BlockShape(16, 48, 16, 3, 1), 2, 8, torch.bfloat16, device="cpu")
    launches: list[Launch] = recorded_launches(step)
    assert not compile_share(launches, 90, 0, 1, threads=2)
    compiled = set(os.listdir(tmp_path))
    assert len(compiled) >= len({specialisation(launch) for launch in launches})
    kernels = {launch.fn for launch in launches}
    with stand_in_driver(90) as handed:
        step()
        assert len(handed) == len(launches)
        for kernel in kernels:  # unloaded by the driver that loaded them
            kernel.device_caches.clear()
        gc.collect()
    assert set(os.listdir(tmp_path)) == compiled
