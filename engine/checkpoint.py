"""Checkpoints: one file holds all state that a run needs to continue, and nothing else does.

Files are written under another name and renamed, and read with `weights_only`, which runs no code from them.
"""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import UserError
from engine.space import Space

FORMAT = 1
"""Version of the file layout."""


@dataclass
class Progress:
    """How far a supernet training is."""

    epoch: int = 0
    """Epochs finished."""
    rounds: int = 0
    """Rounds of paths finished."""
    passes: int = 0
    """Forward-backward passes over an image batch."""
    batches: int = 0
    """Image batches taken from the loader."""
    shrink_steps: int = 0
    """Shrink steps finished."""


def checkpoint_file(directory: Path, epoch: int) -> Path:
    return directory / f"epoch-{epoch:04d}.pt"


def save_checkpoint(
    directory: Path, space: Space, progress: Progress, state: dict[str, Any], keep: set[int], last: int = 2
) -> Path:
    """Write the checkpoint of an epoch; older ones go, except those of the epochs in `keep` and the `last` newest."""
    file = checkpoint_file(directory, progress.epoch)
    write_state(file, {"space": space.to_json(), "progress": asdict(progress), **state})
    for old in _all(directory)[:-last]:
        if _epoch(old) not in keep:
            old.unlink()
    return file


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data; the file appears whole or not at all. Raises `UserError` when it cannot."""
    temporary = file.with_suffix(".tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            torch.save({"format": FORMAT, **state}, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"checkpoint {file} cannot be written: {error}; free space and continue with --resume"
        ) from None


def read_state(file: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU. Raises `UserError` for a damaged file or another format."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint {file} cannot be read: {reason}; remove it to continue from the one before"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{file} is no checkpoint of format {FORMAT}; use a file that this version wrote")
    return state


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint, or None when there is none yet."""
    files = _all(directory)
    return files[-1] if files else None


def load_checkpoint(file: Path, full_space: Space) -> tuple[Space, Progress, dict[str, Any]]:
    """(space at that time, progress, everything else). Raises `UserError` for a damaged file or another space's."""
    state = read_state(file)
    try:
        space, progress = Space.from_json(state.pop("space")), Progress(**state.pop("progress"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no checkpoint of a supernet: {error}; use the run's own files") from None
    if space.fingerprint != full_space.fingerprint:
        raise UserError(f"checkpoint {file} belongs to another search space than the run's; use the run's own files")
    return space, progress, state


def _all(directory: Path) -> list[Path]:
    return sorted((file for file in directory.glob("epoch-*.pt") if file.stem[6:].isdecimal()), key=_epoch)


def _epoch(file: Path) -> int:
    return int(file.stem.removeprefix("epoch-"))
