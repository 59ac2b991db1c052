"""Command lines from dataclasses, and what every script shares."""

import io
import json
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from bsnas.engine.host.console import ConsoleOptions, use_options
from bsnas.engine.host.errors import UserError

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


def load_deepspeed_overrides(file: Path | None) -> dict[str, Any]:
    """A user's DeepSpeed JSON. Raises `UserError` when it is no JSON object."""
    if file is None:
        return {}
    try:
        overrides = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed configuration {file} cannot be read: {error}; give a JSON file") from None
    if not isinstance(overrides, dict):
        raise UserError(
            f'DeepSpeed configuration {file} holds no JSON object; give a file like {{"comms_logger": {{}}}}'
        )
    return overrides


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    """Write a script's figures to the file of --json. Raises `UserError` when it cannot be written."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"figures cannot be written to {file}: {error.strerror}; choose another --json") from None
