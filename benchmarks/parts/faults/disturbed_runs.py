"""Runs of the scripts that get disturbed: real processes, forked from one that has loaded the libraries already.

A start takes a second instead of ten, so that a hundred kills can be tried. Everything else is as on a command line:
own process, own signals, exit code, and what it says in a file.
"""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from bsnas.engine.checkpoints.manifest import read_manifest
from bsnas.engine.checkpoints.tensor_file import read_tensors
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.training.metrics import CLOCK_VALUES

ROOT = Path(__file__).resolve().parents[3]
PRELOADED = (
    "deepspeed", "torch._dynamo", "torch.utils.tensorboard", "bsnas.engine.train", "bsnas.engine.retrain",
    "bsnas.engine.export", "bsnas.search.evolve", "bsnas.search.runs.search_run",
    "bsnas.benchmarks.parts.faults.disturbed_runs",
)  # fmt: skip
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What is wrong with a process's surroundings."""

    file_bytes: int | None = None
    """Files cannot grow beyond this (RLIMIT_FSIZE): a disk that is full."""
    patch: Callable[[], None] | None = None
    """A function of a module, called before the script."""


class Started:
    """A script at work."""

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        faults: Faults = Faults(),
        cold: bool = False,
    ) -> None:
        """`script` as `engine/train.py`; `cold` starts an interpreter of its own, whose imports take their time."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self._process: Any
        if cold:
            command = [sys.executable, str(ROOT / script), *arguments]
            with open(log, "ab") as output:
                self._process = subprocess.Popen(command, stdout=output, stderr=output, cwd=log.parent)
        else:
            if not torch.cuda.is_available():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no GPU
            _context.set_forkserver_preload(list(PRELOADED))
            work = (script, list(arguments), log, dict(environment or {}), faults)
            self._process = _context.Process(target=_work, args=work)
            self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self, seconds: float) -> int | None:
        """The exit code (negative: a signal) as soon as it has ended; None when it has not within that time."""
        if isinstance(self._process, subprocess.Popen):
            try:
                return self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return None
        self._process.join(seconds)
        return self._process.exitcode

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.ended(0) is None:
            os.kill(self.pid, number)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _work(script: str, arguments: list[str], log: Path, environment: dict[str, str], faults: Faults) -> None:
    """In the forked process: what the interpreter does for a script."""
    with open(log, "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)  # type: ignore[misc]
    os.environ.update(environment)
    os.chdir(log.parent)
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background has it ignored
    if faults.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (faults.file_bytes, faults.file_bytes))
    from bsnas.engine.host.script import run

    if faults.patch is not None:
        faults.patch()
    run(import_module("bsnas." + script.removesuffix(".py").replace("/", ".")).main)


def start_ranks(
    count: int, script: str, arguments: Sequence[str], log: Path, *, faults: Sequence[Faults] = ()
) -> list[Started]:
    """Several processes of one script, as a launcher starts them."""
    return [
        Started(
            script,
            arguments,
            log.with_name(f"{log.stem}-rank{rank}.log"),
            environment=environment,
            faults=faults[rank] if faults else Faults(),
        )
        for rank, environment in enumerate(rank_environments(count))
    ]


def rank_environments(count: int) -> list[dict[str, str]]:
    """What a launcher sets for each of so many processes of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    return [{**common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


# ---- what a run ends with


def outcome(path: Path, without: str | None = None) -> dict[str, Any]:
    """Everything that a run decided, by file: weights, metrics, scores, spaces, generations. Nothing of the clock.

    The checkpoint `without` is left out.
    """
    run = RunDir(path)
    result: dict[str, Any] = {}
    for file in sorted(path.glob("checkpoints/*.pt")):
        manifest = read_manifest(file)
        if file.stem != without and manifest.kept:
            result[f"checkpoints/{file.name}"] = _timeless(read_tensors(file)) | {"progress": asdict(manifest.progress)}
    for name in ("spaces", "shrink", "search"):
        for file in sorted((path / name).glob("*.json")):
            result[f"{name}/{file.name}"] = json.loads(file.read_text())
    for metrics in (run.metrics_file, run.retrain.metrics_file):
        if metrics.exists():
            lines = [json.loads(line) for line in metrics.read_text().splitlines()]
            result[str(metrics.relative_to(path))] = [_timeless(line) for line in lines]
    if run.evaluations.exists():
        with sqlite3.connect(run.evaluations) as database:
            query = "SELECT * FROM evaluations ORDER BY weights, images, mode, arch"
            result["evaluations.sqlite"] = database.execute(query).fetchall()
    if run.retrain.network_file.exists():
        result["retrain/network.pt"] = read_tensors(run.retrain.network_file)
        result["retrain/result.json"] = json.loads(run.retrain.result_file.read_text())
    for file in sorted(run.export.glob("*.onnx")):
        result[f"export/{file.name}"] = file.read_bytes()
    return result


def _timeless(values: Any) -> Any:
    if isinstance(values, dict):
        left_out = (*CLOCK_VALUES, "metrics_bytes")
        return {key: _timeless(value) for key, value in values.items() if key not in left_out}
    return values


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """Where two outcomes differ in any bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [f"{where}: tensors differ"]
    if isinstance(first, dict) and isinstance(second, dict):
        found = [f"{where}/{key}: in one of both" for key in first.keys() ^ second.keys()]
        return found + [
            d for key in first.keys() & second.keys() for d in differences(first[key], second[key], f"{where}/{key}")
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}")]
    return [] if first == second else [f"{where}: {first!r:.60} and {second!r:.60}"]


def error_lines(text: str) -> list[str]:
    """What a process said that went wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something to happen in another process. Raises `TimeoutError` when it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not happen within {seconds} s")
        time.sleep(0.01)
