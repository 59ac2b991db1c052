"""Run directories: who may write, what is refused, and that nothing is written over."""

import json
import os
import re
import subprocess
import sys

import pytest

from bsnas.engine.host.errors import UserError
from bsnas.engine.presets import preset
from bsnas.engine.runs.rundir import RunDir, read_json, write_json
from bsnas.engine.space.arch import BlockOp, Operation
from bsnas.engine.space.mobile import mobile_form
from tests import ROOT

CONFIG = preset("digits")


def test_a_run_is_created_and_opened(tmp_path):
    run = RunDir.create(tmp_path / "runs" / "one", CONFIG)
    assert RunDir.open(str(run.path)).config() == CONFIG
    assert run.spaces() == [CONFIG.space]
    assert run.space_file(2) == run.path / "spaces" / "step-2.json"
    assert run.shrink_file(2) == run.path / "shrink" / "step-2.json"


def test_a_relative_path_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert RunDir("a/b").path == tmp_path / "a" / "b"
    assert RunDir("~/b").path == tmp_path / "home" / "b"


def test_spaces_after_each_step(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    first = CONFIG.space.with_live([[op for op in ops if op.block_op.kernel != 7] for ops in CONFIG.space.live])
    second = first.with_live([[op for op in ops if op.block_op.expansion == 3] for ops in first.live])
    for step, space in enumerate((first, second), start=1):
        write_json(run.space_file(step), space.to_json())
    assert run.spaces() == [CONFIG.space, first, second]
    assert run.spaces()[2].live[0][0] == Operation(BlockOp(3, 3), 16)
    run.space_file(2).write_text('{"clusters": 3}')
    with pytest.raises(UserError, match="this is not a search space"):
        run.spaces()


# ---- refused


def test_an_existing_run_is_not_written_over(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    before = run.config_file.read_bytes()
    with pytest.raises(UserError, match=f"{tmp_path} already holds a run; continue it with --resume or choose"):
        RunDir.create(tmp_path, preset("fashion-mnist"))
    assert run.config_file.read_bytes() == before


def test_a_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"is not empty \(thesis.txt, ...\) and holds no run; choose a new or empty"):
        RunDir.create(tmp_path, CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_path_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run directory .*file/run cannot be made: .*; choose another --run"):
        RunDir.create(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(UserError, match=r"run directory .*file cannot be made"):
        RunDir.create(tmp_path / "file", CONFIG)


def test_no_run_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(config.json is missing\); give the directory that engine/tr"):
        RunDir.open(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        RunDir.open(tmp_path / "nowhere")


def test_a_damaged_configuration(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    run.config_file.write_text('{"preset": ')
    with pytest.raises(UserError, match=r"config.json cannot be read as JSON: .*; restore it or start a new run"):
        run.config()
    run.config_file.write_text('{"preset": "digits"}')
    with pytest.raises(UserError, match=r"config.json: space: Field required"):
        run.config()
    run.config_file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        run.config()


def test_a_configuration_of_before_spells_operations_as_numbers(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    data = read_json(run.config_file)
    numbers = [[[*op.block_op[:2], op.channels] for op in ops] for ops in CONFIG.space.live]
    data["space"] = {**mobile_form(CONFIG.space), "live": numbers}
    write_json(run.config_file, data)
    assert run.config() == CONFIG
    data["space"]["live"][0][0] = [3, True, 8]
    write_json(run.config_file, data)
    with pytest.raises(UserError, match=r"config.json: space: .*operation 'k3tTruec8' does not parse"):
        run.config()


# ---- the lock


def test_a_run_in_use_is_refused_by_name(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    with run.lock():
        with pytest.raises(UserError) as raised, RunDir(tmp_path).lock():
            raise AssertionError("two hold the lock")
        assert re.fullmatch(
            rf"run directory {tmp_path} is in use by process {os.getpid()} on \S+; "
            "wait for it, stop it, or choose another --run",
            str(raised.value),
        )
    with run.lock():  # free again
        pass


def test_a_killed_process_leaves_no_lock(tmp_path):
    run = RunDir.create(tmp_path, CONFIG)
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from bsnas.engine.runs.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on"), run.lock():
            pass
        holder.kill()
        holder.wait()
    with run.lock():
        assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_lock_from_before_is_no_foreign_file(tmp_path):
    tmp_path.joinpath("lock").write_text("process 1 on elsewhere\n")
    assert RunDir.create(tmp_path, CONFIG).config() == CONFIG


# ---- small files


def test_json_files_are_whole_or_absent(tmp_path):
    file = tmp_path / "deep" / "file.json"
    write_json(file, {"a": [1, 2]})
    assert read_json(file) == {"a": [1, 2]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": [1, 2]}
    assert [entry.name for entry in file.parent.iterdir()] == ["file.json"]
    assert json.loads(file.read_text()) == {"a": [1, 2]}
    with pytest.raises(UserError, match=r"cannot write .*; choose a directory that can be written"):
        write_json(file / "below.json", {})
    with pytest.raises(UserError, match=r"missing.json cannot be read as JSON: .*No such file"):
        read_json(tmp_path / "missing.json")
