"""What a training refuses to go on from, and what it does about numbers that are none."""

import random
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bsnas.engine.checkpoints.checkpoint import write_checkpoint
from bsnas.engine.checkpoints.keep import newest_checkpoint
from bsnas.engine.checkpoints.manifest import Checkpoint, Manifest, Progress, manifest_file
from bsnas.engine.checkpoints.tensor_file import read_tensors
from bsnas.engine.config import OptimizerConfig, SafetyConfig
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.evaluation.evaluator import Evaluator, weights_fingerprint
from bsnas.engine.evaluation.store import EvaluationStore, StoreKey, Tally
from bsnas.engine.host import preemption
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import MachineError, UserError, machine_failure
from bsnas.engine.host.preemption import Preempted, deferred
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.training.loop import Step
from bsnas.engine.training.metrics import Meter
from bsnas.engine.training.network import NetworkTraining
from bsnas.engine.training.optimization import Optimization
from bsnas.engine.training.resume import find_checkpoint, load_of_rank, of_ranks
from bsnas.engine.training.supernet import SupernetTraining
from tests.engine.evaluation.cases import random_images, small_space, trained_like_supernet
from tests.engine.tiny import TINY, random_archs
from tests.engine.training.cases import metrics, tiny_config


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def no_signal() -> Any:
    preemption.forget()
    yield
    preemption.forget()


def trainer(path: Path, cache: Path, process: Process, safety: SafetyConfig | None = None) -> SupernetTraining:
    config = tiny_config(cache)
    run = RunDir(path) if path.exists() else RunDir.create(path, config)
    return SupernetTraining(
        config, run, process, open_dataset(config.data, run.split_file), {}, safety or SafetyConfig()
    )


# ---- numbers that are none


def poison(one: SupernetTraining, positions: tuple[int, ...]) -> None:
    receive = one.loader._receive

    def poisoned(position: int) -> Any:
        images, labels = receive(position)
        return (images * float("nan") if position in positions else images), labels

    one.loader._receive = poisoned  # type: ignore[method-assign]


def test_a_step_without_numbers_changes_nothing_and_is_counted(alone: Process, cache: Path, tmp_path: Path) -> None:
    one = trainer(tmp_path / "run", cache, alone)
    poison(one, (0, 2))
    before = {name: tensor.clone() for name, tensor in one.network.state_dict().items()}
    step, states = one._step, []

    def stepped(made: Step) -> None:
        step(made)
        states.append({name: tensor.clone() for name, tensor in one.network.state_dict().items()})

    one._step = stepped  # type: ignore[method-assign]
    one.network.train()
    one.make_steps(one.round(one.batches()))
    first = {n: t for n, t in states[0].items() if not n.endswith("num_batches_tracked")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.items())
    assert any(not torch.equal(states[1][name], before[name]) for name in first)
    assert one.progress.skipped == 2
    assert one.progress.skipped_in_a_row == 0
    assert all(tensor.isfinite().all() for tensor in one.network.state_dict().values())


def test_too_many_in_a_row_end_with_epoch_step_path_and_images(alone: Process, cache: Path, tmp_path: Path) -> None:
    one = trainer(tmp_path / "run", cache, alone, SafetyConfig(max_skipped=3))
    poison(one, (5, 6, 7))
    with pytest.raises(UserError) as raised:
        one.train()
    told = str(raised.value)
    assert "loss or gradient is not finite 3 steps in a row, last in epoch 1, pass 8, path c" in told
    assert f"images {one.loader.names(7, [0])}; the newest checkpoint is intact" in told


# ---- told to stop


def test_told_to_stop_while_scoring_it_keeps_what_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supernet, data, file = trained_like_supernet(small_space()), random_images(40), tmp_path / "e.sqlite"
    archs = random_archs(small_space(), 8)
    expected = Evaluator(supernet, data).evaluate(archs)
    evaluator = Evaluator(supernet, data, store=file)
    evaluator.memory = replace(evaluator.memory, max_chunk=4)
    save = EvaluationStore.save

    def told(self: EvaluationStore, *arguments: Any) -> None:
        save(self, *arguments)
        preemption._State.signal_name = "SIGTERM"

    monkeypatch.setattr(EvaluationStore, "save", told)
    with pytest.raises(Preempted, match=r"stopped by SIGTERM; what was finished is kept, the same command continues"):
        evaluator.evaluate(archs)
    monkeypatch.undo()
    preemption.forget()
    again = Evaluator(supernet, data, store=file)
    assert {tally.seen for tally in again.store.load(StoreKey(*_key(again))).values()} == {4}
    assert [(s.correct1, s.correct5) for s in again.evaluate(archs)] == [(s.correct1, s.correct5) for s in expected]


def test_stopped_in_a_round_that_reaches_past_its_epoch_it_finishes_the_round(
    alone: Process, cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(cache)
    config = replace(config, optimizer=replace(config.optimizer, batch_size=300))

    def start(name: str) -> SupernetTraining:
        run = RunDir(tmp_path / name) if (tmp_path / name).exists() else RunDir.create(tmp_path / name, config)
        return SupernetTraining(config, run, alone, open_dataset(config.data, run.split_file), {})

    whole, stopped = start("whole"), start("stopped")
    whole.train()
    step = stopped._step

    def told(made: Step) -> None:
        step(made)
        if stopped.progress.passes == 6:
            preemption._State.signal_name = "SIGTERM"

    stopped._step = told  # type: ignore[method-assign]
    with pytest.raises(Preempted):
        stopped.train()
    progress = stopped.progress
    assert stopped.loader.steps_per_epoch <= progress.passes == 6
    assert (progress.epoch, progress.rounds, progress.paths) == (0, 1, 2)
    preemption.forget()
    again = start("stopped")
    again.train()
    assert metrics(again.run) == metrics(whole.run)
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, whole.network.state_dict()[name]), name


def _key(evaluator: Evaluator) -> tuple[str, str, str]:
    return (weights_fingerprint(evaluator.supernet), *evaluator._fingerprints)


def test_what_nobody_asked_for_is_raised_at_the_end() -> None:
    after: list[str] = []

    def work() -> None:
        with deferred():
            with deferred():
                preemption._State.signal_name = "SIGINT"
            after.append("the inner one")

    with pytest.raises(Preempted):
        work()
    assert after == ["the inner one"]


FORKED = """
import os, signal, sys, time
from bsnas.engine.host import preemption
preemption.GRACE_SECONDS = 1.0
{before}
preemption.handle_signals()
preemption.started()
with preemption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    {inside}
"""


@pytest.mark.parametrize(
    ("before", "inside", "line"),
    [
        ("", "time.sleep(2)", "no answer to a signal for 1 s: ended; the newest checkpoint is whole\n"),
        (
            "preemption.SAME_REQUEST_SECONDS = 0.1",
            "time.sleep(0.3); os.kill(os.getpid(), signal.SIGTERM)",
            "a second signal: ended at once; the newest checkpoint is whole\n",
        ),
        ("", "os.kill(os.getpid(), signal.SIGTERM)", ""),  # passed on by a launcher: the same one
    ],
)
def test_a_signal_without_an_answer_ends_the_process(before: str, inside: str, line: str) -> None:
    program = FORKED.format(before=before, inside=inside)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, line)


def test_a_training_is_saved_between_two_steps(alone: Process, cache: Path, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", cache, alone)
    whole.train()
    one = trainer(tmp_path / "run", cache, alone)
    step = one._step

    def told(made: Step) -> None:
        step(made)
        if one.progress.passes == 8:
            preemption._State.signal_name = "SIGTERM"

    one._step = told  # type: ignore[method-assign]
    with pytest.raises(
        Preempted, match=r"stopped by SIGTERM in epoch 1 after 8 passes; saved in .* s; continue with --r"
    ):
        one.train()
    preemption.forget()
    again = trainer(tmp_path / "run", cache, alone)
    assert again.progress.passes == 8
    again.train()
    assert metrics(again.run) == metrics(whole.run)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


def retraining(path: Path, cache: Path, process: Process) -> NetworkTraining:
    config = tiny_config(cache)
    torch.manual_seed(0)
    network = Subnet(config.space, uniform_arch(config.space, random.Random(0)))
    data = open_dataset(config.data, path / "split.json")
    return NetworkTraining(network, config, path / "retrain", {"arch": "a"}, process, data, {})


def test_a_retraining_is_saved_between_two_steps(alone: Process, cache: Path, tmp_path: Path) -> None:
    whole = retraining(tmp_path / "whole", cache, alone)
    whole.train()
    one = retraining(tmp_path / "run", cache, alone)
    step = one._step

    def told(made: Step) -> None:
        step(made)
        if one.progress.passes == 4:
            preemption._State.signal_name = "SIGTERM"

    one._step = told  # type: ignore[method-assign]
    with pytest.raises(Preempted, match=r"in epoch 1 after 4 steps; saved in .* s; the same command continues"):
        one.train()
    preemption.forget()
    again = retraining(tmp_path / "run", cache, alone)
    assert again.progress.passes == 4
    again.train()
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name


# ---- refused


@pytest.fixture(scope="module")
def inside(alone: Process, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped inside its first epoch."""
    path = tmp_path_factory.mktemp("inside") / "run"
    one = trainer(path, cache, alone)
    preemption._State.signal_name = "SIGTERM"
    with pytest.raises(Preempted):
        one.train()
    preemption.forget()
    return path


def change(path: Path, about: dict[str, Any], entries: dict[str, Any]) -> Checkpoint:
    """The newest checkpoint of a run, written again with other contents."""
    found = newest_checkpoint(path / "checkpoints")
    assert found is not None
    state = {**read_tensors(found.file), **entries}
    write_checkpoint(path / "checkpoints", replace(found.manifest, **about), state)
    again = newest_checkpoint(path / "checkpoints")
    assert again is not None
    return again


@pytest.mark.parametrize(
    ("about", "entries", "message"),
    [
        ({"data": "0" * 64}, {}, r"was trained on another data set or split than the run's now \(fingerprint 0000"),
        ({"whole_epoch": False}, {"statistics_of_ranks": None}, r"statistics_of_ranks in .* is NoneType; it must be"),
        ({}, {"supernet": {}}, r"holds no weights of this network"),
        (
            {},
            {"meter_of_ranks": torch.zeros(2, 4, dtype=torch.float64)},
            r"meter_of_ranks in .* is torch.float64 \[2, 4\]",
        ),
        (
            {},
            {"optimization": {"optimizer": {"param_groups": []}}},
            r"the optimizer in .* has other parameters or settings",
        ),
        ({}, {"metrics_bytes": -3}, r"metrics_bytes in .* is -3 instead of int"),
        ({}, {"probes": {"a": torch.ones(1)}}, r"probes in .* holds .* for 'a'; names and numbers belong there"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    alone: Process, cache: Path, tmp_path: Path, inside: Path, about: Any, entries: Any, message: str
) -> None:
    shutil.copytree(inside, tmp_path / "run")
    change(tmp_path / "run", about, entries)
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", cache, alone)


def test_a_checkpoint_past_the_end_is_refused(alone: Process, cache: Path, tmp_path: Path, inside: Path) -> None:
    shutil.copytree(inside, tmp_path / "run")
    progress = Progress(epoch=9, passes=2000)
    change(tmp_path / "run", {"progress": progress}, {})
    with pytest.raises(
        UserError, match=r"is past the end of this training: 9 epochs and 0 shrink steps; use the run's"
    ):
        trainer(tmp_path / "run", cache, alone)


def test_an_optimizer_that_does_not_fit_is_refused(alone: Process) -> None:
    optimization = Optimization(Supernet(TINY), OptimizerConfig(batch_size=4), alone, "fp32", {})
    state, file = optimization.state(), Path("a.pt")
    optimization.load_state({"o": state}, "o", file)
    optimizer = state["optimizer"]
    for values, message in (
        (
            {10**6: {"momentum_buffer": torch.ones(1)}},
            r"the optimizer in a.pt knows a parameter 1000000; use the run's",
        ),
        (
            {0: {"momentum_buffer": torch.ones(1)}},
            r"momentum 0 in a.pt is torch.float32 \[1\]; it must be torch.float32",
        ),
    ):
        changed = {**state, "optimizer": {**optimizer, "state": values}}
        with pytest.raises(UserError, match=message):
            optimization.load_state({"o": changed}, "o", file)
    scale = {**state["finiteness"], "scale": torch.tensor(float("inf"))}
    with pytest.raises(UserError, match=r"the loss scale in a.pt is inf; it must be above 0"):
        optimization.load_state({"o": {**state, "finiteness": scale}}, "o", file)


def test_another_number_of_processes_or_device_goes_on_from_an_epoch_and_says_so(
    alone: Process, tmp_path: Path
) -> None:
    said: list[str] = []
    whole = Manifest(progress=Progress(epoch=1, passes=10), processes=2, device="H100", data="d")
    write_checkpoint(tmp_path, whole, {})
    inside = replace(whole, progress=Progress(epoch=1, passes=15), whole_epoch=False)
    write_checkpoint(tmp_path, inside, {})
    found = find_checkpoint(tmp_path, alone, "d", said.append)
    assert found is not None
    assert found.manifest.progress.passes == 10
    assert said[0].startswith("1 processes instead of 2: continues from the end of epoch 1; ")
    assert said[1].startswith("cpu instead of H100: kernels round differently there")
    assert not manifest_file(tmp_path / f"{inside.name}.pt").exists()


def test_what_belongs_to_a_rank_comes_back(alone: Process, tmp_path: Path) -> None:
    optimization = Optimization(Supernet(TINY), OptimizerConfig(batch_size=4), alone, "fp32", {})
    meter = Meter(alone.device)
    meter.state()[:] = torch.tensor([1.0, 2, 3, 4])
    optimization.statistics.values.fill_(0.5)
    parts = {"statistics": optimization.statistics, "meter": meter}
    state = of_ranks(alone, parts)
    state = {name: tensor.clone() for name, tensor in state.items()}
    optimization.statistics.values.zero_()
    load_of_rank(state, alone, parts, tmp_path)
    assert (optimization.statistics.values == 0.5).all()
    assert meter.state().tolist() == [1, 2, 3, 0]


def test_stored_evaluations_of_more_images_than_there_are(tmp_path: Path) -> None:
    supernet, data, file = trained_like_supernet(small_space()), random_images(10), tmp_path / "e.sqlite"
    (arch,) = random_archs(small_space(), 1)
    evaluator = Evaluator(supernet, data, store=file)
    evaluator.store.save(StoreKey(*_key(evaluator)), {str(arch): Tally(16, 0, 0.0, bytes(2))})
    with pytest.raises(UserError, match=r"stored evaluations are of more images than the 10 of this set; restore the"):
        evaluator.evaluate([arch])


# ---- the machine


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "no memory: none is left; end other programs or lower the batch size, then continue"),
        (
            RuntimeError("CUDA out of memory. Tried"),
            "no memory: CUDA out of memory. Tried; end other programs or lower",
        ),
        (RuntimeError("could not create a primitive"), "no memory: could not create a primitive; end other programs"),
        (RuntimeError("std::bad_alloc"), "no memory: std::bad_alloc; end other programs"),
        (OSError(28, "x", "/a/b"), "/a/b: No space left on device; free space, then continue"),
        (OSError(30, "x"), "Read-only file system; choose a directory that can be written, then continue"),
        (RuntimeError("[gloo] Connection closed by peer"), "another process of this run was lost or does not answer ("),
    ],
)
def test_a_failing_machine_is_told_in_one_line(error: BaseException, line: str) -> None:
    failure = machine_failure(error)
    assert isinstance(failure, MachineError)
    assert str(failure).startswith(line)


def test_a_full_disk_under_the_evaluations_is_the_machines() -> None:
    failure = machine_failure(sqlite3.OperationalError("database or disk is full"))
    assert (
        str(failure) == "the file of evaluations: database or disk is full; free space or mend the file, then continue"
    )


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        OSError(2, "x"),
        ValueError("x"),
    ],
)
def test_a_bug_stays_a_bug(error: BaseException) -> None:
    assert machine_failure(error) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SafetyConfig(checkpoint_minutes=0), "checkpoint minutes 0, timeout minutes 30: each must be above 0"),
        (lambda: SafetyConfig(timeout_minutes=float("inf")), "timeout minutes inf: each must be above 0"),
        (lambda: SafetyConfig(checkpoints=0), "checkpoints 0, max skipped 20: each must be at least 1"),
        (lambda: SafetyConfig(max_skipped=0), "checkpoints 2, max skipped 0: each must be at least 1"),
    ],
)
def test_settings_of_safety(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
