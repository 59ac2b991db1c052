"""Optimizer steps through DeepSpeed: who moves, who does not, and by how much."""

import math
import random
import sys
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from bsnas.engine.config import OptimizerConfig
from bsnas.engine.host.distributed import Process, average_batchnorm, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.precision import default_precision
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.training.optimization import Optimization, deepspeed_config, learning_rate
from tests.engine.evaluation.cases import trained_like_supernet
from tests.engine.space.strategies import shrunk_at_random
from tests.engine.tiny import ARCH, SHARINGS, TINY, images

CONFIG = OptimizerConfig(batch_size=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01)
LABELS = torch.arange(4) % TINY.classes
CPU = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def optimization(supernet: Supernet, process: Process) -> Optimization:
    return Optimization(supernet, CONFIG, process, "fp32", {})


def train_path(engine: Optimization, supernet: Supernet, arch: Arch, seed: int, lr: float = 0.05) -> float:
    loss = F.cross_entropy(engine.forward(images(TINY, seed=seed), arch), LABELS)
    engine.backward(loss)
    engine.step(supernet.active_parameters(arch), lr)
    return loss.item()


def snapshot(supernet: Supernet, engine: Optimization) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    state = engine.optimizer.state
    return {name: (p.detach().clone(), state[p]["momentum_buffer"].clone()) for name, p in supernet.named_parameters()}


@pytest.mark.parametrize("sharing", SHARINGS)
def test_operations_that_are_not_sampled_keep_weights_and_momentum_bit_for_bit(sharing, alone):
    supernet = trained_like_supernet(TINY, sharing).train()
    engine = optimization(supernet, alone)
    for number, arch in enumerate(path for r in range(2) for path in fair_round(TINY, 0, r)):
        train_path(engine, supernet, arch, number)  # everybody has momentum now
    before = snapshot(supernet, engine)
    buffers = {name: buffer.clone() for name, buffer in supernet.named_buffers()}
    for number in range(4):
        train_path(engine, supernet, ARCH, number)
    after = snapshot(supernet, engine)
    active = {id(p) for p in supernet.active_parameters(ARCH)}
    idle = {name for name, p in supernet.named_parameters() if id(p) not in active}
    assert len(idle) > len(active)
    for name, (weight, momentum) in before.items():
        assert torch.equal(weight, after[name][0]) == (name in idle), name
        assert torch.equal(momentum, after[name][1]) == (name in idle), name
    for name, buffer in supernet.named_buffers():
        if name.rpartition(".")[0] + ".weight" in idle:
            assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("update", ["path", "round"])
def test_steps_are_those_of_plain_sgd(update, alone):
    """Every path, or every round with its paths' gradients added up; weights and losses as torch alone has them.

    With frozen statistics: those of four images amplify the rounding of another memory format.
    """
    supernet, plain = trained_like_supernet(TINY).eval(), trained_like_supernet(TINY).eval()
    engine = optimization(supernet, alone)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    start = [p.detach().clone() for p in supernet.parameters()]
    for index in range(2):
        paths = fair_round(TINY, 1, index)
        sgd.param_groups[0]["lr"] = lr = 0.02 * (index + 1)
        for number, arch in enumerate(paths):
            x = images(TINY, seed=number)
            mine = F.cross_entropy(engine.forward(x, arch), LABELS)
            theirs = F.cross_entropy(plain(x, arch), LABELS)
            assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
            engine.backward(mine)
            theirs.backward()
            if update == "path" or number == len(paths) - 1:
                used = paths if update == "round" else [arch]
                engine.step({p: None for a in used for p in supernet.active_parameters(a)}, lr)
                sgd.step()
                sgd.zero_grad(set_to_none=True)
                assert all(p.grad is None for p in supernet.parameters())
    for (name, a), b, first in zip(supernet.named_parameters(), plain.parameters(), start, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(a, first), name


@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_runs_no_python_function_for_each_parameter(processes, alone):
    """Such calls took a seventh of a round's time on a GPU, where the host has to be ahead of it."""
    supernet = trained_like_supernet(TINY).train()
    engine = optimization(supernet, alone)
    engine.world_size = processes  # gradients are averaged with nobody's
    calls = Counter()

    def count(frame, event, argument):
        calls[frame.f_code] += event == "call"

    for index in range(2):  # the first step sets up what later ones find
        paths = fair_round(TINY, 0, index)
        for number, arch in enumerate(paths):
            engine.backward(F.cross_entropy(engine.forward(images(TINY, seed=number), arch), LABELS))
        calls.clear()
        sys.setprofile(count)
        try:
            used = {id(p): p for arch in paths for p in supernet.active_parameters(arch)}
            engine.step(used.values(), 0.1)
        finally:
            sys.setprofile(None)
    assert max(calls.values()) < len(used) / 2, calls.most_common(3)


def test_after_shrinking_the_dropped_weights_are_in_no_optimizer(alone):
    larger = trained_like_supernet(TINY, "channels").train()
    space = shrunk_at_random(TINY, random.Random(4))
    smaller = larger.shrunk(space)
    kept = {name: p.detach().clone() for name, p in larger.named_parameters()}
    engine = optimization(smaller, alone)
    for number, arch in enumerate(fair_round(space, 0, 0)):
        train_path(engine, smaller, arch, number)
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in smaller.parameters()}
    for name, p in larger.named_parameters():
        assert torch.equal(p, kept[name]), name


# ---- learning rate


def test_learning_rate_warms_up_linearly_and_falls_as_a_cosine():
    config = OptimizerConfig(warmup_epochs=5)
    at = [learning_rate(config, 0.045, epoch, 240) for epoch in (0, 2.5, 5, 120, 239, 240, 300)]
    assert at[0] == 0
    assert at[1] == pytest.approx(0.045 * 0.5 * 0.5 * (1 + math.cos(math.pi * 2.5 / 240)))
    assert at[2] == pytest.approx(0.045 * 0.5 * (1 + math.cos(math.pi * 5 / 240)))
    assert at[3] == pytest.approx(0.0225)
    assert 0 < at[4] < 1e-5
    assert at[5:] == [0, 0]
    assert learning_rate(OptimizerConfig(warmup_epochs=0), 0.1, 0, 10) == 0.1


def test_a_power_changes_the_decay_and_neither_peak_nor_warmup():
    config = OptimizerConfig(warmup_epochs=5)
    for epoch in (0, 2.5, 5, 120, 239):
        decay = learning_rate(config, 1, epoch, 240) / (min(epoch, 5) / 5 or 1)
        assert learning_rate(config, 0.1, epoch, 240, 2) == pytest.approx(0.1 * min(epoch, 5) / 5 * decay**2)


# ---- the DeepSpeed configuration


def test_a_users_settings_merge_over_ours():
    config = deepspeed_config(
        8, CPU, "bf16", {"gradient_clipping": 1.5, "timers": {"throughput": {"synchronized": False}}}
    )
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_clipping"] == 1.5
    assert config["timers"] == {"throughput": {"enabled": False, "synchronized": False}}
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert deepspeed_config(8, CPU, "fp16", {})["torch_autocast"]["dtype"] == "float16"
    assert "torch_autocast" not in deepspeed_config(8, CPU, "fp32", {})


def test_a_batch_divides_over_the_processes():
    three = Process(rank=0, world_size=3, local_rank=0, device=torch.device("cpu"))
    assert three.per_rank(9) == 3
    with pytest.raises(UserError, match="batch size 8 does not divide over 3 processes; take a multiple of 3"):
        deepspeed_config(8, three, "fp32", {})


def test_precision_by_device():
    assert default_precision(CPU.device) == "fp32"
    assert default_precision(torch.device("cuda", 0)) == "bf16"


# ---- ranks


def test_alone_nothing_is_exchanged(alone):
    supernet = trained_like_supernet(TINY)
    before = [buffer.clone() for buffer in supernet.buffers()]
    average_batchnorm(supernet)
    assert all(map(torch.equal, before, supernet.buffers()))
    assert on_main(alone, lambda: 3) == 3

    def fails() -> None:
        raise UserError("no such thing")

    with pytest.raises(UserError, match=r"^no such thing$"):
        on_main(alone, fails)
