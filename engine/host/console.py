"""What a script shows its user, and where everything else goes.

`--quiet` leaves errors only. Messages of libraries (DeepSpeed, DALI, NCCL, warnings) go to a log file of the run, also
those that are written past Python, since file descriptors 1 and 2 are redirected; `--verbose` leaves them on the
console. Whatever takes longer than two seconds shows a bar with the time left on a terminal, and notes what it does in
the run's `activity.json`, which engine/status.py reads.
"""

import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError

NOTE_SECONDS = 2.0
"""Least time between two notes of the activity."""


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions:
    """How much a script says."""

    quiet: bool = False
    """Say nothing but errors."""
    verbose: bool = False
    """Show messages of libraries here, instead of in the run's logs/."""

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise UserError("--quiet and --verbose exclude each other; give one of them")


class _State:
    """The console of this process: there is one, as there is one standard output."""

    options = ConsoleOptions()
    messages: "LibraryMessages | None" = None
    activity_file: Path | None = None
    noted = 0.0


def use_options(options: ConsoleOptions) -> None:
    """Apply `--quiet` and `--verbose` to the rest of the process."""
    _State.options = options
    if options.quiet:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - as long as the process


def quiet() -> bool:
    return _State.options.quiet


def verbose(text: str) -> None:
    """Print a line that only `--verbose` asks for."""
    if _State.options.verbose:
        print(text, flush=True)


class LibraryMessages:
    """File descriptors 1 and 2 of this process lead into a file; Python's `print` still reaches the user.

    It begins with a nameless file, since libraries speak before the run directory is known; `keep_in` names it.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.file: Path | None = None
        self._begin = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - copied by keep_in
        out, err = (os.fdopen(os.dup(fd), "w", buffering=1, errors="replace") for fd in (1, 2))
        self.stream: IO[str] = os.fdopen(os.dup(self._begin.fileno()), "w", buffering=1, errors="replace")
        self._point_to(self._begin.fileno())
        if not _State.options.quiet:
            sys.stdout = out
        sys.stderr = err
        warnings.showwarning = self._show_warning
        sys.excepthook = self._explain

    def keep_in(self, file: Path) -> None:
        """Append what was said so far, and everything from now on, to `file`."""
        if file == self.file:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab", buffering=0) as target:
            if self.file is None:
                self._begin.seek(0)
                shutil.copyfileobj(self._begin, target)
            os.dup2(target.fileno(), self.stream.fileno())
            self._point_to(target.fileno())
        self.file = file

    def adopt_loggers(self) -> None:
        """Loggers that took standard output when they were made write into the file too."""
        loggers = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
        for handler in (handler for logger in loggers for handler in logger.handlers):
            if type(handler) is logging.StreamHandler:
                handler.setStream(self.stream)

    @staticmethod
    def _point_to(target: int) -> None:
        os.dup2(target, 1)
        os.dup2(target, 2)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        self.stream.write(warnings.formatwarning(message, category, filename, lineno, line))

    def _explain(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        if self.file is not None:
            print(f"messages of libraries are in {self.file}", file=sys.stderr)
        else:
            self._begin.seek(0)
            sys.stderr.write(self._begin.read().decode(errors="replace"))


def hide_libraries() -> None:
    """Send messages of libraries to a file from now on, except with `--verbose` or where a test captures the output."""
    if _State.messages is None and not _State.options.verbose and sys.stderr is sys.__stderr__:
        _State.messages = LibraryMessages()


def adopt_loggers() -> None:
    """To be called after the import of a library that logs to standard output."""
    if _State.messages is not None:
        _State.messages.adopt_loggers()


def keep_messages(file: Path) -> None:
    """Hide messages of libraries in `file`."""
    hide_libraries()
    if _State.messages is not None:
        _State.messages.keep_in(file)
        adopt_loggers()


# ---- activity


def note_activity_in(file: Path | None) -> None:
    """Where progress is noted from now on; None ends it and removes the file."""
    if file is None and _State.activity_file is not None:
        _State.activity_file.unlink(missing_ok=True)
    _State.activity_file = file
    _State.noted = 0.0


def activity_due() -> bool:
    return _State.activity_file is not None and time.time() - _State.noted > NOTE_SECONDS


def note_activity(doing: str, done: float, total: float | None, *, unit: str = "", started: float, **more: Any) -> None:
    """Write what is done now, at most every two seconds; `started` is the time at which `done` was 0."""
    if not activity_due() or _State.activity_file is None:
        return
    _State.noted = time.time()
    values = {"doing": doing, "done": done, "total": total, "unit": unit, "started": started, "time": _State.noted}
    with suppress(UserError):  # a note that cannot be written stops nothing
        write_atomically(_State.activity_file, json.dumps({**values, **more}).encode(), durable=False)


# ---- progress bars


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Speed(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None or not self._unit else f"{task.speed:,.0f} {self._unit}/s")


class Progress:
    """A bar with speed and time left, on standard error of a terminal; elsewhere only the activity is noted.

    Without a total it is a spinner, for work whose length nobody knows.
    """

    def __init__(self, description: str, total: float | None, *, unit: str = "", enabled: bool = True) -> None:
        self.description, self.total, self.unit = description, total, unit
        self._enabled = enabled
        self._done = 0.0
        self._started = time.time()
        self._lock = threading.Lock()
        console = Console(stderr=True)
        columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
        if total is None:
            columns.insert(0, SpinnerColumn())
        else:
            columns += [BarColumn(), TextColumn("{task.percentage:3.0f} %"), _Speed(unit), TimeRemainingColumn()]
        hidden = quiet() or not enabled or not console.is_terminal
        self._bar = RichProgress(*columns, console=console, disable=hidden, transient=True)
        self._task = self._bar.add_task(description, total=total)

    def advance(self, amount: float = 1) -> None:
        with self._lock:
            self._done += amount
            self._bar.advance(self._task, amount)
            self._note()

    def _note(self) -> None:
        if self._enabled:
            note_activity(self.description, self._done, self.total, unit=self.unit, started=self._started)

    def __enter__(self) -> "Progress":
        self._bar.start()
        self._note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
