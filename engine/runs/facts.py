"""What the files of a run say, read without disturbing whoever writes there: for status and report. No torch.

A run may be in progress: what is not there yet is empty, a line that is half written is left out, and a file that
cannot be read is named in `damaged`. Nothing is locked and nothing is written.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.space import Space

Row = dict[str, Any]


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
    """The files of one run. Raises `UserError` when there is none, or its configuration is not to be read."""

    def __init__(self, path: Path | str) -> None:
        self.directory = RunDir.open(path)
        self.config = self.directory.config()
        self.space = self.config.space
        self.damaged: list[str] = []

    # ---- training

    @cached_property
    def metrics(self) -> list[Row]:
        return self._lines(self.directory.metrics_file)

    @property
    def epochs(self) -> list[Row]:
        return [line for line in self.metrics if line.get("kind") == "epoch"]

    @property
    def probes(self) -> list[Row]:
        return [line for line in self.metrics if line.get("kind") == "probe"]

    @cached_property
    def spaces(self) -> list[Space]:
        """The full space and those after each shrink step so far."""
        spaces = [self.space]
        while (data := self._json(self.directory.space_file(len(spaces)))) is not None:
            spaces.append(Space.from_json(data))
        return spaces

    @cached_property
    def shrink_steps(self) -> list[ShrinkStep]:
        steps: list[ShrinkStep] = []
        while (data := self._json(self.directory.shrink_file(len(steps) + 1))) is not None:
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
                    tuple({Operation.parse(name): r for name, r in block.items()} for block in data["importance"]),
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
        for file in sorted(self.directory.search_files(), key=_modified):
            data = self._json(file)
            if isinstance(data, dict) and "generations" in data:
                request = data.get("request", {})
                generations = tuple(tuple(rows) for rows in data["generations"])
                found.append(Search(file, request.get("limits", {}), request.get("evolution", {}), generations))
        return found

    @cached_property
    def best(self) -> Row | None:
        return self._json(self.directory.best_file)

    @cached_property
    def front(self) -> list[Row]:
        return self._json(self.directory.front_file) or []

    @cached_property
    def finals(self) -> Row:
        """What search/finals.py found: `rungs` of networks, the best first, and the `winner`."""
        return self._json(self.directory.finals_file) or {}

    @cached_property
    def retrain_epochs(self) -> list[Row]:
        return [line for line in self._lines(self.directory.retrain.metrics_file) if line.get("kind") == "epoch"]

    @cached_property
    def retrained(self) -> Row | None:
        return self._json(self.directory.retrain.result_file)

    @cached_property
    def latency(self) -> Row:
        return self._json(self.directory.latency_file) or {}

    @cached_property
    def latency_tables(self) -> list[Path]:
        """Files of search/latency.py, the newest last."""
        return sorted(self.directory.latency_tables(), key=_modified)

    @cached_property
    def ranking(self) -> Row:
        """One-shot against stand-alone accuracy, where benchmarks/ranking.py has measured it."""
        return self._json(self.directory.ranking_file) or {}

    @cached_property
    def exports(self) -> list[Path]:
        return sorted(self.directory.export.glob("*.onnx"))

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
        for line in self._lines(self.directory.commands_file):
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
        file = self.directory.evaluations
        if not file.is_file():
            return {"subnets": 0, "images": 0}
        try:
            database = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=1)
            subnets, images = database.execute("SELECT count(*), total(seen) FROM evaluations").fetchone()
            database.close()
        except sqlite3.Error as error:
            self._damaged(file, error)
            return {"subnets": 0, "images": 0}
        return {"subnets": subnets, "images": int(images)}

    @property
    def activity(self) -> Row | None:
        """The last progress that the process at work has noted."""
        return self._json(self.directory.activity_file)

    def last_change(self) -> float:
        """When a file of the run was last written, in seconds since 1970."""
        run = self.directory
        files = [run.config_file, run.metrics_file, run.retrain.metrics_file, run.evaluations, run.activity_file]
        return max(map(_modified, [*files, run.commands_file, *run.search.glob("*.json")]))

    # ---- reading

    def _json(self, file: Path) -> Any:
        text = self._text(file)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            self._damaged(file, error)
            return None

    def _lines(self, file: Path) -> list[Row]:
        lines = (self._text(file) or "").splitlines()
        return [row for row in map(_line, lines) if row is not None]

    def _text(self, file: Path) -> str | None:
        try:
            return file.read_text()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._damaged(file, error)
            return None

    def _damaged(self, file: Path, error: Exception) -> None:
        self.damaged.append(f"{file.relative_to(self.directory.path)}: {error}")


def _line(text: str) -> Row | None:
    try:
        row = json.loads(text)
    except ValueError:  # being written, or the last line of a killed run
        return None
    return row if isinstance(row, dict) else None


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
