"""What the launcher's environment says, and one line where it is nonsense."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.loading.decode import thread_count
from bsnas.engine.host import distributed, launcher
from bsnas.engine.host.distributed import start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import run

NAMES = ("MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """What a process that starts adds to the environment goes, too."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_a_process_is_alone():
    told = launcher.rank(), launcher.world_size(), launcher.local_rank(), launcher.local_size(), launcher.master_port()
    assert told == (0, 1, 0, 1, None)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 4),  # torchrun
        ({"LOCAL_SIZE": "8"}, 4),  # deepspeed
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "8"}, 8),
        ({"LOCAL_SIZE": "64"}, 1),
    ],
)
def test_decode_threads_are_shared_between_the_processes_of_a_machine(monkeypatch, environment, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(32))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert thread_count(DataConfig()) == threads
    assert thread_count(DataConfig(threads=3)) == 3


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0', not a whole number of at least 1; unset it"),
        ({"LOCAL_SIZE": ""}, "LOCAL_SIZE is '', not a whole number of at least 1"),
        ({"RANK": ""}, "RANK is '', not a whole number of at least 0"),
        ({"RANK": "-1"}, "RANK is '-1', not a whole number of at least 0"),
        ({"LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0', not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', not a whole number of at least 1"),
        ({"MASTER_PORT": "none"}, "MASTER_PORT is 'none', not a whole number from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536', not a whole number from 1 to 65535"),
        ({"MASTER_ADDR": " "}, "the environment variable MASTER_ADDR is empty; unset it, or give the host of rank 0"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1; ranks count from 0 to WORLD_SIZE - 1"),
    ],
)
def test_nonsense_is_an_error_of_the_user(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def starts() -> None:
        thread_count(DataConfig())
        start_process()

    with pytest.raises(UserError) as caught:
        starts()
    assert message in str(caught.value)


def test_a_process_that_does_not_know_its_rank_says_so_itself(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "")
    with pytest.raises(SystemExit) as stop:
        run(start_process)  # type: ignore[arg-type]
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: the environment variable RANK is ''")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK is 2, but this process sees GPUs 0 to 1 only; start one process"):
        start_process()


def test_fp32_is_not_tf32_on_a_gpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed

    class Joined(Exception):
        pass

    def joins(**settings: object) -> None:
        raise Joined

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(deepspeed, "init_distributed", joins)
    monkeypatch.setattr(distributed, "_force_kernels", lambda name, device: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises(Joined):
        start_process()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


MEET = """
import sys
from bsnas.engine.host import distributed
from bsnas.engine.host.script import run
distributed.TELL_AFTER = 0.5
sys.argv = ["meet"]
run(lambda: distributed.start_process(0.05))
"""


@pytest.mark.parametrize(
    ("rank", "told", "ended"),
    [
        (0, "waiting for ranks 1, 2 of 3 processes; those that are there are on ", "of 3 processes ranks 1, 2 did not"),
        (2, "waits for rank 0 at 127.0.0.1, port ", "rank 2 cannot meet the others at 127.0.0.1, port "),
    ],
)
def test_who_is_missing_at_the_start_is_told(rank, told, ended):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", MEET]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert told in done.stderr
    assert f"error: {ended}" in done.stderr
    assert "Traceback" not in done.stderr
