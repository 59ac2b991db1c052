"""A run directory: where each of its files lies, who may write, and how its small files are read. No torch.

config.json            the resolved configuration
split.json             the search-validation split
checkpoints/           weights, optimizer and progress at the end of epochs
metrics.jsonl          one line per epoch, probe and shrink step
tensorboard/           the same scalars
spaces/step-N.json     the space after shrink step N
shrink/step-N.json     the models that step N scored, and R_i of every operation
evaluations.sqlite     every subnet evaluation
search/                a file per search, its best architecture, the Pareto set
finals/                the networks that were trained to choose among, and finals.json
retrain/               the network trained from scratch
export/                ONNX
latency/               latency tables, timings, measured latencies
ranking/               one-shot against stand-alone accuracy
figures/               what each step of benchmarks/demo.py gave as --json
report.html, report/   the report, its pictures and tables
commands.jsonl         every command that worked on the run
activity.json          what the command at work does
logs/                  messages of libraries
lock                   who works on the run
"""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bsnas.engine.config import RunConfig, read_config, to_json
from bsnas.engine.host.atomic import write_atomically, write_error
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.locks import exclusive, is_held, lives
from bsnas.engine.space.space import Space

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read: a search of 100,000 architectures has 50 MB."""


@dataclass(frozen=True)
class Owner:
    """Who holds the lock of a run."""

    text: str
    """As the owner wrote it: `process PID on HOST`."""
    alive: bool
    """Whether it still holds the lock; True when it is on another machine, which cannot be asked."""
    elsewhere: bool = False


class NetworkDir:
    """The files of one network's training: a run's retrain/, or a directory of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.request_file = path / "request.json"
        self.checkpoints = path / "checkpoints"
        self.metrics_file = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.network_file = path / "network.pt"
        self.result_file = path / "result.json"


class RunDir:
    """Paths inside a run directory and the small files in it."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.config_file = self.path / "config.json"
        self.split_file = self.path / "split.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.evaluations = self.path / "evaluations.sqlite"
        self.search = self.path / "search"
        self.best_file = self.search / "best.json"
        self.front_file = self.search / "pareto.json"
        self.finals = self.path / "finals"
        self.finals_file = self.finals / "finals.json"
        self.retrain = NetworkDir(self.path / "retrain")
        self.export = self.path / "export"
        self.latency = self.path / "latency"
        self.latency_file = self.latency / "latency.json"
        self.timings_file = self.latency / "timings.sqlite"
        self.ranking = self.path / "ranking"
        self.ranking_file = self.ranking / "ranking.json"
        self.figures = self.path / "figures"
        self.report_file = self.path / "report.html"
        self.commands_file = self.path / "commands.jsonl"
        self.activity_file = self.path / "activity.json"
        self.logs = self.path / "logs"
        self.lock_file = self.path / "lock"

    def space_file(self, step: int) -> Path:
        return self.path / "spaces" / f"step-{step}.json"

    def shrink_file(self, step: int) -> Path:
        return self.path / "shrink" / f"step-{step}.json"

    def search_files(self) -> list[Path]:
        """A file per search."""
        return [file for file in sorted(self.search.glob("*.json")) if file not in (self.best_file, self.front_file)]

    def latency_table(self, backend: str, batch: int, precision: str) -> Path:
        """Where the latency table of a context lies."""
        return self.latency / f"model-{backend}-b{batch}-{precision}.json"

    def latency_tables(self) -> list[Path]:
        return sorted(self.latency.glob("model-*.json"))

    # ---- opening

    @classmethod
    def create(cls, path: Path | str, config: RunConfig) -> "RunDir":
        """Start a run in a new or empty directory. Raises `UserError` when something is there already."""
        run = cls.refuse_existing(path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run directory {run.path} cannot be made: {error.strerror}; choose another --run"
            ) from None
        foreign = [entry.name for entry in run.path.iterdir() if not _left_by_a_start(entry.name)]
        if foreign:
            raise UserError(
                f"{run.path} is not empty ({foreign[0]}, ...) and holds no run; choose a new or empty directory"
            )
        write_json(run.config_file, to_json(config))
        return run

    @classmethod
    def refuse_existing(cls, path: Path | str) -> "RunDir":
        """The paths of a run that is still to be made. Raises `UserError` when there is a run already."""
        run = cls(path)
        if run.config_file.exists():
            raise UserError(f"{run.path} already holds a run; continue it with --resume or choose another --run")
        return run

    @classmethod
    def open(cls, path: Path | str) -> "RunDir":
        """An existing run. Raises `UserError` when there is none."""
        run = cls(path)
        if not run.config_file.is_file():
            raise UserError(
                f"{run.path} holds no run (config.json is missing); give the directory that engine/train.py wrote"
            )
        return run

    # ---- who works on it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing here; the lock goes with the process. Raises `UserError` when taken."""
        try:
            opened = open(self.lock_file, "a+")  # noqa: SIM115 - closed below
        except OSError as error:
            raise write_error(self.lock_file, error) from None
        with opened as handle, ExitStack() as held:
            try:
                held.enter_context(exclusive(handle, self.lock_file, wait=False))
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read().strip() or "another process"
                raise UserError(
                    f"run directory {self.path} is in use by {owner}; wait for it, stop it, or choose another --run"
                ) from None
            handle.seek(0)
            handle.truncate()
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
            yield

    def owner(self) -> Owner | None:
        """Who works on the run: asked of the system's table of locks, never by taking the lock."""
        try:
            text, inode = self.lock_file.read_text().strip(), self.lock_file.stat().st_ino
        except OSError:
            return None
        match = re.fullmatch(r"process (\d+) on (\S+)", text)
        if match is not None and match[2] != socket.gethostname():
            return Owner(text, alive=True, elsewhere=True)
        locked = _is_locked(inode, int(match[1]) if match else None)
        return Owner(text, alive=locked or is_held(self.lock_file))

    # ---- what it holds

    def config(self) -> RunConfig:
        return read_config(read_json(self.config_file), self.config_file)

    def spaces(self) -> list[Space]:
        """The full space and the spaces after each shrink step made so far."""
        spaces = [self.config().space]
        while (file := self.space_file(len(spaces))).is_file():
            spaces.append(Space.from_json(read_json(file)))
        return spaces


def _left_by_a_start(name: str) -> bool:
    """Whether a start of a run that was killed at once leaves such a file."""
    return name == "lock" or (name.startswith(".config.json.") and name.endswith(".tmp"))


def _is_locked(inode: int, pid: int | None) -> bool:
    """Whether /proc/locks lists a lock on the file; where it cannot be read, whether the process lives."""
    try:
        rows = Path("/proc/locks").read_text().splitlines()
        return any(row.split()[5].rsplit(":", 1)[-1] == str(inode) for row in rows if len(row.split()) > 5)
    except OSError:
        return pid is not None and lives(pid)


def json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=1) + "\n").encode()


def write_json(file: Path, data: Any) -> None:
    """Write a JSON file atomically. Raises `UserError` when the directory cannot be written."""
    write_atomically(file, json_bytes(data))


def read_json(file: Path) -> Any:
    """The data in a JSON file. Raises `UserError` naming the file when it cannot be read."""
    try:
        with open(file, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > MAX_JSON_BYTES:
                raise UserError(
                    f"{file} is larger than {MAX_JSON_BYTES >> 20} MiB, no file of a run; restore it or start a new run"
                )
            content = handle.read(size)
        return json.loads(content.decode())
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}; restore it or start a new run") from None
