"""Which commands worked on a run, with which versions, how long and with how much energy: `commands.jsonl`.

Each command writes a line when it starts and one when it ends, so a killed one is known by its missing end.
"""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bsnas.engine.host import launcher
from bsnas.engine.host.console import keep_messages, note_activity_in
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir

PACKAGES = (
    "torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "onnx", "onnxruntime", "tensorrt",
    "tensorrt-rtx", "numpy",
)  # fmt: skip
RAPL = Path("/sys/class/powercap")
"""The processor's own counters."""


@contextmanager
def recorded(run: RunDir, script: str, *, device: torch.device | None = None) -> Iterator[None]:
    """Record a command on a run, and keep messages of libraries in the run's logs/.

    Only the main process writes the record; other ranks only have a log of their own.
    """
    rank = launcher.rank()
    keep_messages(run.logs / (f"{script}-rank{rank}.log" if rank else f"{script}.log"))
    if rank:
        yield
        return
    device = device or torch.device("cpu")
    started, energy = time.perf_counter(), EnergyMeter(device)
    who = {"script": script, "pid": os.getpid(), "host": socket.gethostname()}
    _append(run, {"event": "start", **who, "time": now(), "command": shlex.join(sys.argv), **environment(device)})
    note_activity_in(run.activity_file)
    outcome = "stopped"
    try:
        yield
        outcome = "done"
    except UserError as error:
        outcome = f"error: {error}"
        raise
    except Exception as error:
        outcome = f"failed: {type(error).__name__}: {error}"
        raise
    finally:
        note_activity_in(None)
        end: dict[str, Any] = {"event": "end", **who, "time": now(), "outcome": outcome}
        end["seconds"] = time.perf_counter() - started
        joules = energy.joules()
        if joules is not None:
            end["joules_of_main_device"] = joules
        with suppress(OSError):  # a full disk has been told by what it stopped
            _append(run, end)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and commit that figures of this process come from."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": hardware(device),
        "processes": launcher.world_size(),
    }


def commit() -> str:
    """The commit of this code, marked with + when files differ from it."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware(device: torch.device) -> str:
    """The GPU, or the processor with its family, which "AMD EPYC" alone does not tell, and the cores to be used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    told = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in _lines(Path("/proc/cpuinfo")))}
    family = f" family {told['cpu family']}" if "cpu family" in told else ""
    return f"{told.get('model name', platform.machine())}{family}, {len(os.sched_getaffinity(0))} cores"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def _append(run: RunDir, entry: dict[str, Any]) -> None:
    with open(run.commands_file, "a") as file:
        file.write(json.dumps(entry) + "\n")


# ---- energy that the machine itself reports; nothing is estimated


class EnergyMeter:
    """Joules since it was made, of one GPU or of the processor packages, whichever computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = self._read()

    def joules(self) -> float | None:
        """None where the device does not report energy, or a counter has wrapped around."""
        now = self._read()
        if now is None or self._first is None or now < self._first:
            return None
        return now - self._first

    def _read(self) -> float | None:
        return _gpu_joules(self._device) if self._device.type == "cuda" else _package_joules()


def _gpu_joules(device: torch.device) -> float | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        # NVML numbers all GPUs of the machine, torch the visible ones: the UUID names the same one in both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(uuid)) / 1000
    except Exception:  # a missing library, an old driver, a virtual GPU: each raises its own kind
        return None


def _package_joules() -> float | None:
    files = sorted(RAPL.glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(file.read_text()) for file in files) / 1e6 if files else None
    except (OSError, ValueError):  # only root may read it on most systems
        return None
