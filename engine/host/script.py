"""What every script shares: a command line from a dataclass, its figures, and how it ends. Torch is loaded late."""

import io
import json
import os
import re
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from bsnas.engine.host import launcher
from bsnas.engine.host.console import ConsoleOptions, use_options
from bsnas.engine.host.errors import EXIT_MACHINE_ERROR, MachineError, UserError, machine_failure
from bsnas.engine.host.preemption import Preempted, handle_signals, started

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], description: str | None, argv: Sequence[str], default: Any = None) -> Arguments:
    """The dataclass filled from `argv`; fields not given come from `default`. Help and usage errors exit by themselves.

    Every script also takes the options of `ConsoleOptions`, which are applied at once.

    DeepSpeed's launcher adds --local_rank=N to every script; the environment says the same, so it is dropped.
    """
    own = [argument for argument in argv if not argument.startswith("--local_rank")]
    # Commands in a description stay on lines of their own, where the help would otherwise fill up paragraphs.
    text = re.sub(r"\n *(?=(?:python|deepspeed) )", "\n\n", description or "")
    options: dict[str, Any] = {"args": own, "description": text, "config": (tyro.conf.FlagCreatePairsOff,)}
    captured = io.StringIO()
    try:
        with redirect_stderr(captured):
            parsed = tyro.cli(with_console_options(kind, default), **options)
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__context__
        if cause is not None:  # raised by a field's check: one line instead of tyro's box
            raise cause from None
        print(captured.getvalue(), end="", file=sys.stderr)
        raise
    use_options(parsed.console)
    return parsed.script


def with_console_options(kind: type[Arguments], default: Arguments | None = None) -> Any:
    """The dataclass of a script's whole command line: `script` (a `kind`) and `console`, without prefixes."""
    unprefixed = tyro.conf.arg(name="")
    script: Any = ("script", Annotated[kind, unprefixed])
    if default is not None:
        script = (*script, field(default=default))
    console = ("console", Annotated[ConsoleOptions, unprefixed], field(default=ConsoleOptions()))
    return make_dataclass(kind.__name__, [script, console], frozen=True, kw_only=True)


def option(argv: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, read before the rest is parsed."""
    for position, argument in enumerate(argv):
        if argument == f"--{name}" and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    """Write a script's figures to the file of --json. Raises `UserError` when it cannot be written."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"figures cannot be written to {file}: {error.strerror}; choose another --json") from None


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; what ends it becomes one line on stderr and an exit code.

    2: the user can mend it. 3: the machine failed. 75: told to stop, to be continued. Everything else is a bug.
    """
    handle_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        started()
        main()
    except Preempted as stop:
        _leave(stop.message, stop.code, told=_rank() != 0)
    except UserError as error:
        # All ranks meet bad input alike and one says it; a machine fails for one rank alone.
        told = error.told or (_rank() != 0 and not isinstance(error, MachineError))
        _leave(f"error: {error}", error.exit_code, told=told)
    except BrokenPipeError:  # whoever reads our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_MACHINE_ERROR) from None
    except (OSError, RuntimeError, MemoryError, sqlite3.Error) as error:
        failure = machine_failure(error)
        if failure is None:
            raise
        _leave(f"error: {failure}", failure.exit_code, told=False)


def _rank() -> int:
    try:
        return launcher.rank()
    except UserError:
        return 0  # a process that does not know its place speaks for itself


def _leave(line: str, code: object, *, told: bool) -> None:
    if not told:
        print(line, file=sys.stderr, flush=True)
    raise SystemExit(code) from None
