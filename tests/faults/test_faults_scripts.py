"""Scripts that are killed, told to stop, or run out of something: one line, an exit code, and nothing is lost.

benchmarks/soak.py does the same at random moments, a hundred times.
"""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bsnas.benchmarks.parts.faults.disturbed_runs import (
    Faults,
    Started,
    differences,
    error_lines,
    outcome,
    start_ranks,
    wait_until,
)
from bsnas.benchmarks.parts.faults.soak_pipeline import poison_rank_1
from bsnas.engine.checkpoints.keep import newest_checkpoint
from bsnas.engine.checkpoints.tensor_file import read_tensors
from tests.faults.runs import EVOLVE, RETRAIN, SECONDS, start, steps, training

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    for script, arguments in (
        ("engine/train.py", training(run, cache)), ("search/evolve.py", EVOLVE), ("engine/retrain.py", RETRAIN),
    ):  # fmt: skip
        process = start(script, run, arguments)
        assert process.ended(SECONDS) == 0, process.said()
    return run


def signalled_when(process: Started, number: int, moment: Callable[[], bool]) -> int | None:
    """The exit code of a process that gets a signal at a moment of its work."""
    wait_until(lambda: process.ended(0) is not None or moment(), SECONDS)
    assert process.ended(0) is None, f"it ended before the moment came:\n{process.said()}"
    process.signal(number)
    return process.ended(SECONDS)


def scored(run: Path) -> int:
    """Subnets in the file of evaluations."""
    if not (run / "evaluations.sqlite").exists():
        return 0
    with sqlite3.connect(run / "evaluations.sqlite") as database:
        try:
            return database.execute("SELECT count(*) FROM evaluations").fetchone()[0]
        except sqlite3.OperationalError:  # the table is not there yet
            return 0


def generations(run: Path) -> int:
    files = [file for file in (run / "search").glob("*.json") if file.name not in ("best.json", "pareto.json")]
    return len(json.loads(files[0].read_text())["generations"]) if files else 0


def inside_epoch(directory: Path) -> bool:
    return any(directory.glob("checkpoints/epoch-*-pass-*.json"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_stopped_everywhere_it_ends_bit_for_bit_as_if_nothing_had_been(
    whole: Path, cache: Path, tmp_path: Path, number: int, code: int
) -> None:
    run = tmp_path / "run"
    moments = [
        ("engine/train.py", lambda: training(run, cache), lambda: inside_epoch(run)),
        ("engine/train.py", lambda: training(run, cache), lambda: scored(run) > 20),  # in the shrink step
        ("search/evolve.py", lambda: EVOLVE, lambda: generations(run) >= 2),
        ("engine/retrain.py", lambda: RETRAIN, lambda: inside_epoch(run / "retrain")),
    ]
    for script, arguments, moment in moments:
        process = start(script, run, arguments())
        assert signalled_when(process, number, moment) == code, process.said()
        said = process.said()
        assert "Traceback" not in said
        if code == 75:
            assert said.count("stopped by SIGTERM") == 1, said
        if moment is not moments[0][2]:  # the training goes on until its second moment
            process = start(script, run, arguments())
            assert process.ended(SECONDS) == 0, process.said()
    assert differences(outcome(whole), outcome(run)) == []
    if code == 75:
        assert steps(run) == steps(whole), "no step is made twice"


def test_told_to_stop_between_two_steps_it_says_where_and_goes_on_there(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("engine/train.py", run, training(run, cache))
    assert signalled_when(process, signal.SIGINT, lambda: inside_epoch(run)) == 75
    (line,) = [line for line in process.said().splitlines() if line.startswith("stopped by SIGINT in epoch 1 after ")]
    passes = line.split(" after ")[1].split()[0]
    assert line.endswith(" s; continue with --resume")
    assert " passes; saved in " in line
    again = start("engine/train.py", run, training(run, cache))
    wait_until(lambda: "continues from" in again.said(), SECONDS)
    assert f"epoch 1, {passes} passes made" in again.said()
    again.signal(signal.SIGKILL)
    again.ended(SECONDS)


def test_a_retraining_says_where_it_was_stopped(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    os.symlink(whole, run)
    arch = json.loads((whole / "search" / "best.json").read_text())["arch"]
    process = start("engine/retrain.py", run, ["--arch", arch, *RETRAIN])
    assert process.ended(SECONDS) == 0, "it is trained already"
    assert "after" not in process.said()
    process = start("engine/retrain.py", run, ["--epochs", "3", *RETRAIN[2:]])
    assert process.ended(SECONDS) == 2
    assert "holds the training of" in error_lines(process.said())[0]


def test_while_it_starts_it_stops_at_once(tmp_path: Path) -> None:
    process = start("engine/train.py", tmp_path / "run", ["--preset", "digits"], cold=True)
    process.ended(1.0)
    process.signal(signal.SIGTERM)
    assert process.ended(SECONDS) == 75
    assert process.said() == "stopped by SIGTERM while starting; the same command continues\n"


def test_two_runs_in_one_directory(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = start("engine/train.py", run, training(run, cache))
    wait_until(lambda: (run / "metrics.jsonl").exists(), SECONDS)
    second = start("engine/retrain.py", run, ["--arch", "c16:k3t3"])
    assert second.ended(SECONDS) == 2
    (line,) = error_lines(second.said())
    assert f"is in use by process {first.pid} on" in line
    first.signal(signal.SIGKILL)
    first.ended(SECONDS)


def test_a_disk_that_is_full_and_then_is_not(whole: Path, cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    size = min(file.stat().st_size for file in whole.glob("checkpoints/*.pt"))
    process = start("engine/train.py", run, training(run, cache), faults=Faults(file_bytes=size // 2))
    assert process.ended(SECONDS) == 3
    (line,) = error_lines(process.said())
    assert "cannot be written: File too large; free space and continue with --resume" in line
    assert "Traceback" not in process.said()
    again = start("engine/train.py", run, training(run, cache))
    assert again.ended(SECONDS) == 0, again.said()
    names = ("checkpoints", "spaces", "shrink", "metrics")
    expected, ended = ({k: v for k, v in outcome(path).items() if k.startswith(names)} for path in (whole, run))
    assert differences(expected, ended) == []


def ask_for_too_much() -> None:
    """The first forward pass wants more memory than any machine has."""
    from bsnas.engine.training.optimization import Optimization

    Optimization.forward = lambda *_: torch.empty(1 << 60, dtype=torch.uint8)  # type: ignore[method-assign]


def test_no_memory(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("engine/train.py", run, training(run, cache), faults=Faults(patch=ask_for_too_much))
    assert process.ended(SECONDS) == 3, process.said()
    (line,) = error_lines(process.said())
    assert line.startswith("error: no memory: ")
    assert line.endswith("; end other programs or lower the batch size, then continue")


# ---- two ranks


def two_ranks(run: Path, cache: Path, *more: str, faults: tuple[Faults, ...] = ()) -> list[Started]:
    arguments = [*training(run, cache), "--run", str(run), *more]
    return start_ranks(2, "engine/train.py", arguments, run.with_suffix(".log"), faults=faults)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_other(cache: Path, tmp_path: Path, number: int) -> None:
    run = tmp_path / "run"
    ranks = two_ranks(run, cache, "--safety.timeout-minutes", "0.3")
    wait_until(lambda: inside_epoch(run), SECONDS)
    ranks[1].signal(number)
    assert ranks[0].ended(100) == 3, ranks[0].said()
    (line,) = error_lines(ranks[0].said())
    assert line.startswith("error: another process of this run was lost or does not answer (")
    assert "Traceback" not in ranks[0].said()
    ranks[1].signal(signal.SIGKILL)
    ranks[1].ended(SECONDS)


def test_a_signal_to_one_rank_stops_both_within_a_step(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = two_ranks(run, cache)
    wait_until(lambda: inside_epoch(run), SECONDS)
    ranks[1].signal(signal.SIGTERM)
    assert [rank.ended(SECONDS) for rank in ranks] == [75, 75]
    assert "stopped by a signal to another process in epoch 1" in ranks[0].said()
    alone = start("engine/train.py", run, training(run, cache))
    assert alone.ended(SECONDS) == 2
    assert "the run was stopped inside its first epoch with 2 processes; continue with 2, or" in alone.said()


def test_no_numbers_on_one_rank_are_skipped_by_both_and_stop_after_too_many(cache: Path, tmp_path: Path) -> None:
    run, poison = tmp_path / "run", (Faults(patch=poison_rank_1),) * 2
    ranks = two_ranks(run, cache, "--shrink.keep", faults=poison)
    assert [rank.ended(SECONDS) for rank in ranks] == [0, 0], ranks[0].said() + ranks[1].said()
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found.manifest.progress.skipped == 3
    weights = read_tensors(found.file)["supernet"]
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())
    run = tmp_path / "stopped"
    ranks = two_ranks(run, cache, "--safety.max-skipped", "3", faults=poison)
    assert [rank.ended(SECONDS) for rank in ranks] == [2, 2]
    lines = [*error_lines(ranks[0].said()), *error_lines(ranks[1].said())]
    assert len(lines) == 1
    assert "loss or gradient is not finite 3 steps in a row, last in epoch 1, pass 8, path c" in lines[0]
    assert ".jpg" in lines[0]
