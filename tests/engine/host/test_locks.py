"""Locks where the file system has some, and where it has none."""

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from bsnas.engine.host.atomic import locked
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.locks import exclusive, held_file, is_held
from bsnas.engine.runs.rundir import RunDir
from tests.search.runs import untrained_run


def refuse(code: int):
    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return flock


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "a"
    with (
        open(path, "w") as one,
        open(path, "w") as two,
        exclusive(one, path, wait=False),
        pytest.raises(BlockingIOError),
        exclusive(two, path, wait=False),
    ):
        pass
    assert not held_file(tmp_path / "a").exists()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_file_stands_for_one(tmp_path, monkeypatch, code):
    monkeypatch.setattr(fcntl, "flock", refuse(code))
    path = tmp_path / "a"
    with locked(path):
        assert is_held(path)
        with open(path) as other, pytest.raises(BlockingIOError), exclusive(other, path, wait=False):
            pass
    assert not is_held(path)
    with locked(path):
        pass


def test_a_run_is_locked_where_there_are_no_locks(tmp_path, monkeypatch):
    run = untrained_run(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with run.lock():
        owner = run.owner()
        assert owner is not None
        assert owner.alive
        other = RunDir(run.path).lock()
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on .*; wait for it"), other:
            pass
    owner = run.owner()
    assert owner is not None
    assert not owner.alive


def test_the_file_of_a_dead_process_is_taken_over_and_that_of_another_machine_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    path = tmp_path / "a"
    path.touch()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    held_file(path).write_text(f"{ended.stdout.strip()} on {socket.gethostname()}\n")
    assert not is_held(path)
    with locked(path):
        pass
    held_file(path).write_text("1 on elsewhere\n")
    assert is_held(path)
    with open(path) as handle, pytest.raises(BlockingIOError), exclusive(handle, path, wait=False):
        pass


def test_a_lock_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    message = "a cannot be locked: Input/output error; choose a directory on another disk"
    with pytest.raises(UserError, match=message), locked(tmp_path / "a"):
        pass
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    message = r"a.held cannot be made: Read-only file system; choose a directory that can be written"
    with pytest.raises(UserError, match=message), locked(tmp_path / "a"):
        pass
