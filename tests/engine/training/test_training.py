"""Supernet training: reproducible, resumable at an epoch, in all sampling modes, leaving dead weights alone."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from bsnas.engine.checkpoints.keep import newest_checkpoint
from bsnas.engine.checkpoints.manifest import write_manifest
from bsnas.engine.config import SamplingConfig
from bsnas.engine.host import preemption
from bsnas.engine.host.deepspeed_settings import check_deepspeed_settings
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.preemption import Preempted
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import sandwich_ends
from bsnas.engine.space.space import Space
from bsnas.engine.training.distillation import distillation
from bsnas.engine.training.loop import Step
from bsnas.engine.training.supernet import SupernetTraining
from bsnas.kernels import graphs
from tests.engine.training.cases import make_trainer, metrics, tiny_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole_run(alone: Process, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, SupernetTraining]:
    """A training from start to end."""
    config = tiny_config(cache)
    run = RunDir.create(tmp_path_factory.mktemp("runs") / "whole", config)
    trainer = make_trainer(run, config, alone)
    trainer.train()
    return run, trainer


def test_a_training_learns_and_shrinks(whole_run: tuple[RunDir, SupernetTraining]) -> None:
    run, trainer = whole_run
    epochs = [line for line in metrics(run) if line["kind"] == "epoch"]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.1
    assert trainer.space.max_live <= 2
    assert run.spaces()[-1] == trainer.space
    assert trainer.figures()["passes"] == trainer.progress.passes >= 3 * trainer.loader.steps_per_epoch


def test_the_same_seed_gives_the_same_metrics(
    whole_run: tuple[RunDir, SupernetTraining], alone: Process, cache: Path, tmp_path: Path
) -> None:
    run, trainer = whole_run
    again = RunDir.create(tmp_path / "again", tiny_config(cache))
    repeated = make_trainer(again, tiny_config(cache), alone)
    repeated.train()
    assert metrics(again) == metrics(run)
    for name, tensor in repeated.network.state_dict().items():
        assert torch.equal(tensor, trainer.network.state_dict()[name]), name


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    whole_run: tuple[RunDir, SupernetTraining], alone: Process, cache: Path, tmp_path: Path, stop_after: int
) -> None:
    run, trainer = whole_run
    config = tiny_config(cache)
    stopped = RunDir.create(tmp_path / "stopped", config)
    first = make_trainer(stopped, config, alone)
    for _ in range(stop_after):
        first.train_epoch()
    if stop_after == 2:
        first.make_shrink_step()  # dies after the step and before the next checkpoint
    first.writer.wait()
    second = make_trainer(stopped, config, alone)
    assert second.progress.epoch == stop_after
    second.train()
    assert metrics(stopped) == metrics(run)
    for name, tensor in second.network.state_dict().items():
        assert torch.equal(tensor, trainer.network.state_dict()[name]), name


def test_a_run_that_0_1_stopped_inside_a_round_of_one_batch_ends_like_an_uninterrupted_one(
    alone: Process, cache: Path, tmp_path: Path
) -> None:
    """It counted the batch of the round under way, which the paths that are left still have to see."""
    config = tiny_config(cache, sampling=SamplingConfig(update="path", batches="shared"))
    whole, stopped = (make_trainer(RunDir.create(tmp_path / n, config), config, alone) for n in ("whole", "stopped"))
    whole.train()
    step = stopped._step

    def told(made: Step) -> None:
        step(made)
        if stopped.progress.passes == 10:
            preemption._State.signal_name = "SIGTERM"

    stopped._step = told  # type: ignore[method-assign]
    try:
        with pytest.raises(Preempted):
            stopped.train()
    finally:
        preemption.forget()
    found = newest_checkpoint(stopped.run.checkpoints)
    assert found is not None
    progress = found.manifest.progress
    assert progress.paths > 0
    assert progress.batches == progress.rounds > 0
    write_manifest(found.file, replace(found.manifest, progress=replace(progress, batches=progress.batches + 1)))
    again = make_trainer(stopped.run, config, alone)
    again.train()
    assert metrics(again.run) == metrics(whole.run)
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, whole.network.state_dict()[name]), name


@pytest.mark.parametrize("distill", ["none", "kl", "alpha"])
def test_a_sandwich_makes_one_step_of_largest_fair_and_smallest(
    alone: Process, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distill: str
) -> None:
    config = tiny_config(cache, sampling=SamplingConfig(sampler="sandwich", distill=distill))  # type: ignore[arg-type]
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    seen: list[tuple[Any, ...]] = []
    forward = trainer.optimization.forward
    monkeypatch.setattr(trainer.optimization, "forward", lambda *inputs: seen.append(inputs) or forward(*inputs))  # type: ignore[func-returns-value]
    trainer.network.train()
    images, labels = next(trainer.batches())
    steps = list(trainer.round(iter([(images, labels)])))
    assert len(steps) == 1
    assert (trainer.progress.passes, trainer.progress.batches, trainer.progress.rounds) == (4, 1, 1)
    assert all(given is images for given, _ in seen)
    (_, largest), _, _, (_, smallest) = seen
    assert (largest, smallest) == sandwich_ends(trainer.space)
    gradients = {name: p.grad.clone() for name, p in trainer.network.named_parameters() if p.grad is not None}
    trainer.network.zero_grad()
    teacher = None
    for _, arch in seen:
        logits = trainer.network(images, arch)
        if teacher is None or distill == "none":
            functional.cross_entropy(logits, labels).backward()
            teacher = logits.detach()
        else:
            distillation(distill, teacher)(logits).backward()
    for name, parameter in trainer.network.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5), name


def test_a_sandwich_learns_shrinks_and_continues(alone: Process, cache: Path, tmp_path: Path) -> None:
    config = tiny_config(cache, sampling=SamplingConfig(sampler="sandwich", distill="kl"))
    whole = make_trainer(RunDir.create(tmp_path / "whole", config), config, alone)
    whole.train()
    assert whole.space.max_live == 2
    stopped = make_trainer(RunDir.create(tmp_path / "stopped", config), config, alone)
    steps = iter(stopped.steps())
    stopped.network.train()
    stopped.make_steps([next(steps) for _ in range(1)])
    stopped.save(whole_epoch=False)
    again = make_trainer(stopped.run, config, alone)
    again.train()
    assert metrics(again.run) == metrics(whole.run)


def test_small_networks_get_a_rate_that_decays_faster(alone: Process, cache: Path, tmp_path: Path) -> None:
    sampling = SamplingConfig(update="path", batches="fresh", complexity_decay=2)
    config = tiny_config(cache, sampling=sampling)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    params = CostModel(trainer.space).params
    assert trainer.decay_power(params.best(min)[1]) == 2
    assert trainer.decay_power(params.best(max)[1]) == 0.5
    rates: list[float] = []
    step = trainer.optimization.step
    trainer.optimization.step = lambda p, rate, notes: rates.append(rate) or step(p, rate, notes)  # type: ignore
    trainer.progress.epoch, trainer.progress.passes = 2, 2 * trainer.loader.steps_per_epoch
    trainer.network.train()
    trainer.make_steps(trainer.round(trainer.batches()))
    drawn = trainer.draw_round(trainer.space, config.seed, 0)
    by_size = [rate for _, rate in sorted(zip(map(params, drawn), rates, strict=True))]
    assert len(set(by_size)) > 1
    assert by_size[0] < by_size[-1]


@pytest.mark.parametrize("batches", ["shared", "fresh"])
@pytest.mark.parametrize("update", ["round", "path"])
@pytest.mark.parametrize("sampler", ["fair", "uniform"])
def test_every_sampling_mode_trains(
    alone: Process, cache: Path, tmp_path: Path, sampler: str, update: str, batches: str
) -> None:
    sampling = SamplingConfig(sampler=sampler, update=update, batches=batches)  # type: ignore[arg-type]
    config = tiny_config(cache, sampling=sampling)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_epoch()
    paths = trainer.progress.rounds * trainer.space.max_live
    assert trainer.progress.passes == paths >= trainer.loader.steps_per_epoch
    assert trainer.progress.batches == (paths if batches == "fresh" else trainer.progress.rounds)
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    if sampler == "fair":
        assert moved == set(before)
    else:
        assert "stem.0.weights.all.conv" in moved


def test_dropped_operations_keep_their_weights(alone: Process, cache: Path, tmp_path: Path) -> None:
    config = tiny_config(cache, sharing="channels")
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    trainer.train_epoch()
    larger = trainer.network
    values = {name: tensor.clone() for name, tensor in larger.state_dict().items()}
    trainer.make_shrink_step()
    survivors = set(trainer.network.state_dict())
    assert survivors < set(values)
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, values[name][tuple(map(slice, tensor.shape))]), name
    trainer.train_epoch()
    for name, tensor in larger.state_dict().items():
        assert torch.equal(tensor, values[name]), name
    owned = {id(p) for group in trainer.optimization.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.network.parameters()}


def test_scoring_gets_the_memory_of_the_graphs(
    alone: Process, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared = []
    monkeypatch.setattr(graphs.GRAPHS, "clear", lambda: cleared.append(True))
    config = tiny_config(cache)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    assert not cleared
    trainer.probe("now")
    assert cleared


def test_after_a_shrink_step_nothing_is_left_of_the_larger_supernet(
    alone: Process, cache: Path, tmp_path: Path
) -> None:
    """Its memory is free at once: on a GPU nothing makes Python look for cycles."""
    config = tiny_config(cache)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    trainer.train_epoch()
    trainer.writer.wait()
    optimization, weight = trainer.optimization, trainer.network.classifier.weight
    owners = (trainer.network, optimization, optimization.engine, optimization.optimizer, weight)
    larger = [weakref.ref(owner) for owner in owners]
    momentum = weakref.ref(optimization.optimizer.state[weight]["momentum_buffer"])
    del owners, optimization, weight
    gc.collect()
    gc.disable()
    try:
        trainer.make_shrink_step()
        assert [owner() for owner in (*larger, momentum)] == [None] * 6
    finally:
        gc.enable()


def test_operations_never_sampled_keep_their_weights(
    alone: Process, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(cache, sharing="channels")
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone)
    fair = trainer.draw_round

    def only_kernel_3(space: Space, seed: int, round_index: int):  # type: ignore[no-untyped-def]
        narrow = space.with_live([[op for op in ops if op.block_op.kernel == 3] for ops in space.live])
        return fair(narrow, seed, round_index)

    monkeypatch.setattr(trainer, "draw_round", only_kernel_3)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.train_epoch()
    never = [name for name in before if "k5t2" in name]
    assert never
    for name in never:
        assert torch.equal(trainer.network.state_dict()[name], before[name]), name
    assert not torch.equal(
        trainer.network.state_dict()["blocks.0.weights.k3t2.project"], before["blocks.0.weights.k3t2.project"]
    )


WORKING = (
    {"gradient_clipping": 0.5},
    {"comms_logger": {"enabled": True}, "wall_clock_breakdown": True, "memory_breakdown": True, "steps_per_print": 1},
    {"dump_state": True, "timers": {"throughput": {"enabled": True}}, "zero_optimization": {"stage": 0}},
    {"communication_data_type": "fp32", "prescale_gradients": True, "gradient_predivide_factor": 1.0},
    {"flops_profiler": {"enabled": True, "profile_step": 2, "output_file": "profile.txt"}},
)


@pytest.mark.parametrize("settings", WORKING, ids=lambda settings: next(iter(settings)))
def test_deepspeeds_keys_that_are_taken_work(
    alone: Process, cache: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_deepspeed_settings(settings, "test")
    config = tiny_config(cache)
    trainer = make_trainer(RunDir.create(tmp_path / "run", config), config, alone, settings)
    plain = make_trainer(RunDir.create(tmp_path / "plain", config), config, alone)
    for one in (trainer, plain):
        one.network.train()
        one.make_steps(one.round(one.batches()))
    same = all(map(torch.equal, trainer.network.parameters(), plain.network.parameters()))
    assert same == ("gradient_clipping" not in settings)
    if "flops_profiler" in settings:
        assert "profile" in (tmp_path / "profile.txt").read_text().lower()
