"""Everything that the files of a run say, read without disturbing whoever writes there. No torch.

A run may be in progress: what is not there yet is empty, a line that is half written is left out, and a file that
cannot be read is named in `damaged`. Nothing is locked and nothing is written.
"""

import json
import os
import re
import socket
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Arch, Operation, Space

Row = dict[str, Any]
NO_SEARCH = ("best.json", "pareto.json")
"""Files of search/ that hold no generations."""


@dataclass(frozen=True)
class Owner:
    """Who holds the lock of a run."""

    text: str
    """As the owner wrote it: `process PID on HOST`."""
    alive: bool
    """Whether it still holds the lock; True when it is on another machine, which cannot be asked."""
    elsewhere: bool = False


@dataclass(frozen=True)
class ShrinkStep:
    """One shrink step: what it scored and what it kept."""

    number: int
    keep: int
    archs: tuple[Arch, ...]
    top1: tuple[float, ...]
    importance: tuple[dict[Operation, float], ...]
    before: Space
    after: Space | None
    """None while the step is being written."""


@dataclass(frozen=True)
class Search:
    """One search: limits, settings and generations of rows with arch, top1 and costs."""

    file: Path
    limits: dict[str, str]
    settings: Row
    generations: tuple[tuple[Row, ...], ...]

    @property
    def rows(self) -> list[Row]:
        return [{**row, "generation": number} for number, rows in enumerate(self.generations) for row in rows]


class RunFacts:
    """The files of one run directory. Raises `UserError` when it holds no run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.damaged: list[str] = []
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{self.path} holds no run (config.json is missing); give the directory that engine/train.py wrote"
            )
        config = self._json("config.json")
        if not isinstance(config, dict) or "space" not in config:
            raise UserError(f"{self.path / 'config.json'} holds no configuration; restore it or start a new run")
        self.config: Row = config
        # The configuration spells operations as lists, where the files of shrink steps have text.
        live = [[str(Operation(*op)) for op in ops] for ops in config["space"]["live"]]
        self.space = Space.from_json({**config["space"], "live": live})

    # ---- training

    @cached_property
    def metrics(self) -> list[Row]:
        return self._lines("metrics.jsonl")

    @property
    def epochs(self) -> list[Row]:
        return [line for line in self.metrics if line.get("kind") == "epoch"]

    @property
    def probes(self) -> list[Row]:
        return [line for line in self.metrics if line.get("kind") == "probe"]

    @property
    def total_epochs(self) -> int:
        shrink = self.config["shrink"]
        return shrink["first_epochs"] + len(shrink["keep"]) * shrink["interval_epochs"]

    @property
    def step_epochs(self) -> list[int]:
        shrink = self.config["shrink"]
        return [shrink["first_epochs"] + i * shrink["interval_epochs"] for i in range(len(shrink["keep"]))]

    @cached_property
    def spaces(self) -> list[Space]:
        """The full space and those after each shrink step so far."""
        spaces = [self.space]
        while (data := self._json(f"spaces/step-{len(spaces)}.json")) is not None:
            spaces.append(Space.from_json(data))
        return spaces

    @cached_property
    def shrink_steps(self) -> list[ShrinkStep]:
        steps: list[ShrinkStep] = []
        while (data := self._json(f"shrink/step-{len(steps) + 1}.json")) is not None:
            number = len(steps) + 1
            if number > len(self.spaces):
                break
            models = data["models"]
            steps.append(
                ShrinkStep(
                    number,
                    data["keep"],
                    tuple(Arch.parse(model["arch"]) for model in models),
                    tuple(model["top1"] for model in models),
                    tuple({_operation(name): r for name, r in block.items()} for block in data["importance"]),
                    self.spaces[number - 1],
                    self.spaces[number] if number < len(self.spaces) else None,
                )
            )
        return steps

    # ---- search, retraining, latency

    @cached_property
    def searches(self) -> list[Search]:
        """All searches, the newest last."""
        found = []
        for file in sorted((self.path / "search").glob("*.json"), key=_modified):
            if file.name in NO_SEARCH:
                continue
            data = self._json(f"search/{file.name}")
            if isinstance(data, dict) and "generations" in data:
                request = data.get("request", {})
                generations = tuple(tuple(rows) for rows in data["generations"])
                found.append(Search(file, request.get("limits", {}), request.get("evolution", {}), generations))
        return found

    @cached_property
    def best(self) -> Row | None:
        return self._json("search/best.json")

    @cached_property
    def front(self) -> list[Row]:
        return self._json("search/pareto.json") or []

    @cached_property
    def retrain_epochs(self) -> list[Row]:
        return [line for line in self._lines("retrain/metrics.jsonl") if line.get("kind") == "epoch"]

    @cached_property
    def retrained(self) -> Row | None:
        return self._json("retrain/result.json")

    @cached_property
    def latency(self) -> Row:
        return self._json("latency/latency.json") or {}

    @cached_property
    def latency_tables(self) -> list[Path]:
        """Files of search/latency.py, the newest last."""
        return sorted((self.path / "latency").glob("model-*.json"), key=_modified)

    @cached_property
    def ranking(self) -> Row:
        """One-shot against stand-alone accuracy, where benchmarks/ranking.py has measured it."""
        return self._json("ranking/ranking.json") or {}

    @cached_property
    def exports(self) -> list[Path]:
        return sorted((self.path / "export").glob("*.onnx"))

    @property
    def chosen(self) -> Arch | None:
        """The architecture that the run stands for: the retrained one, else the best found."""
        row = self.retrained or self.best
        return Arch.parse(row["arch"]) if row else None

    # ---- what was and is done

    @cached_property
    def commands(self) -> list[Row]:
        """Every command that worked on the run: its start, with `seconds` and `outcome` of its end where it has one."""
        commands: list[Row] = []
        for line in self._lines("commands.jsonl"):
            if line.get("event") == "start":
                commands.append({key: value for key, value in line.items() if key != "event"})
                continue
            same = [c for c in commands if c["pid"] == line["pid"] and c["script"] == line["script"]]
            if same:
                same[-1].update({key: line[key] for key in line if key not in ("event", "time")}, ended=line["time"])
        return commands

    @cached_property
    def evaluations(self) -> Row:
        """Counts of the store: subnets scored, and model-images shown to them."""
        file = self.path / "evaluations.sqlite"
        if not file.is_file():
            return {"subnets": 0, "images": 0}
        try:
            database = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=1)
            subnets, images = database.execute("SELECT count(*), total(seen) FROM evaluations").fetchone()
            database.close()
        except sqlite3.Error as error:
            self.damaged.append(f"evaluations.sqlite: {error}")
            return {"subnets": 0, "images": 0}
        return {"subnets": subnets, "images": int(images)}

    @property
    def activity(self) -> Row | None:
        """The last progress that the process at work has noted."""
        return self._json("activity.json")

    def owner(self) -> Owner | None:
        """Who works on the run: asked of the system's table of locks, never by taking the lock."""
        file = self.path / "lock"
        try:
            text, inode = file.read_text().strip(), file.stat().st_ino
        except OSError:
            return None
        match = re.fullmatch(r"process (\d+) on (\S+)", text)
        if match is not None and match[2] != socket.gethostname():
            return Owner(text, alive=True, elsewhere=True)
        return Owner(text, alive=_is_locked(inode, int(match[1]) if match else None))

    def last_change(self) -> float:
        """When a file of the run was last written, in seconds since 1970."""
        names = ("config.json", "metrics.jsonl", "retrain/metrics.jsonl", "evaluations.sqlite", "activity.json")
        files = [self.path / name for name in (*names, "commands.jsonl")]
        files += (self.path / "search").glob("*.json")
        return max(_modified(file) for file in files)

    # ---- reading

    def _json(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.damaged.append(f"{name}: {error}")
            return None

    def _lines(self, name: str) -> list[Row]:
        try:
            lines = (self.path / name).read_text().splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self.damaged.append(f"{name}: {error}")
            return []
        return [row for row in map(_line, lines) if row is not None]


def _line(text: str) -> Row | None:
    try:
        row = json.loads(text)
    except ValueError:  # being written, or the last line of a killed run
        return None
    return row if isinstance(row, dict) else None


def _operation(text: str) -> Operation:
    match = re.fullmatch(r"k(\d+)t(\d+)c(\d+)", text)
    if match is None:
        raise UserError(f"{text!r} is no operation; take files that this program wrote")
    return Operation(*map(int, match.groups()))


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _is_locked(inode: int, pid: int | None) -> bool:
    """Whether /proc/locks lists a lock on the file; where it cannot be read, whether the process lives."""
    try:
        rows = Path("/proc/locks").read_text().splitlines()
        return any(row.split()[5].rsplit(":", 1)[-1] == str(inode) for row in rows if len(row.split()) > 5)
    except OSError:
        return pid is not None and _lives(pid)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def ago(seconds_since_1970: float) -> str:
    """`12 s ago`, `3 min ago`, ..."""
    seconds = max(0.0, time.time() - seconds_since_1970)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
