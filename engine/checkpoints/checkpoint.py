"""Checkpoints: everything that a training needs to continue, in one file, and a manifest that proves it whole.

NAME.pt is written under another name, brought to the disk and renamed, and then its manifest NAME.json likewise. Files
are read with `weights_only`, which runs no code from them. `CheckpointWriter` writes beside the training.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bsnas.engine.checkpoints.keep import remove_old
from bsnas.engine.checkpoints.manifest import FORMAT, NAME, Manifest, write_manifest
from bsnas.engine.checkpoints.tensor_file import read_tensors, write_tensors
from bsnas.engine.host.atomic import write_error
from bsnas.engine.host.errors import MachineError, UserError, machine_failure
from bsnas.engine.space.space import Space


def write_checkpoint(directory: Path, manifest: Manifest, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and its manifest, whole or not at all. Raises `UserError` or `MachineError` when it cannot."""
    file = directory / f"{manifest.name}.pt"
    try:
        size, digest = write_tensors(file, {"format": FORMAT, **state})
        write_manifest(file, replace(manifest, bytes=size, sha256=digest))
    except OSError as error:
        raise _cannot_write(file, write_error(file, error)) from None
    except MachineError as error:
        raise _cannot_write(file, error) from None
    return file


def _cannot_write(file: Path, error: UserError) -> UserError:
    reason = str(error).split(": ", 1)[-1].split(";", 1)[0]
    return type(error)(f"checkpoint {file} cannot be written: {reason}; free space and continue with --resume")


def read_state(file: Path) -> dict[str, Any]:
    """What was written, on the CPU. Raises `UserError` for a damaged file or another format."""
    try:
        state = read_tensors(file)
    except ValueError as error:
        raise UserError(
            f"checkpoint {file} cannot be read: {error}; remove it to continue from the one before"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{file} is no checkpoint of format {FORMAT}; use a file that this version wrote")
    return state


def load_checkpoint(file: Path, full_space: Space) -> tuple[Space, dict[str, Any]]:
    """(space at that time, everything else). Raises `UserError` for a damaged file or another space's."""
    state = read_state(file)
    return space_of(state, file, full_space), state


def space_of(state: Mapping[str, Any], file: Path, full_space: Space) -> Space:
    """The space of a checkpoint. Raises `UserError` when it is none, or of another table."""
    try:
        space = Space.from_json(state.get("space"))
    except UserError as error:
        raise UserError(f"checkpoint {file}: {error}") from None
    if space.fingerprint != full_space.fingerprint:
        raise UserError(
            f"checkpoint {file} belongs to another search space than the run's: {_difference(space, full_space)}; "
            "use the run's own files"
        )
    return space


def _difference(theirs: Space, ours: Space) -> str:
    """The first entry of two tables that differs."""
    own, other = ours.to_json(), theirs.to_json()
    tables = own.pop("table"), other.pop("table")
    for name in own:
        if name != "live" and own[name] != other[name]:
            return f"{name} is {other[name]} there and {own[name]} here"
    if len(tables[0]) != len(tables[1]):
        return f"{len(tables[1])} clusters there and {len(tables[0])} here"
    for j, (mine, yours) in enumerate(zip(*tables, strict=True), start=1):
        if len(mine["rows"]) != len(yours["rows"]):
            return f"cluster {j} has {len(yours['rows'])} rows there and {len(mine['rows'])} here"
        pairs = [(mine, yours), *zip(mine["rows"], yours["rows"], strict=True)]
        for a, b in pairs:
            for key in a:
                if key != "rows" and a[key] != b[key]:
                    return f"{key} of cluster {j} is {b[key]} there and {a[key]} here"
    return "the tables differ"


def snapshot(state: Any) -> Any:
    """A copy on the CPU of all tensors in nested dictionaries, lists and tuples."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state


class CheckpointWriter:
    """Writes the checkpoints of one directory in a thread, one at a time; the training waits for the snapshot only."""

    def __init__(self, directory: Path, last: int) -> None:
        self.directory = directory
        self.last = last
        self.stall_seconds = 0.0
        """For which training stood still."""
        self.written = 0
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        for file in directory.glob("epoch-*.tmp"):  # a killed process left it half written
            if NAME.fullmatch(file.stem):
                file.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last write failed; `wait` says why."""
        return self._error is not None

    def save(self, manifest: Manifest, state: Mapping[str, Any]) -> None:
        """Copy the state and write it beside the training. Raises what the write before raised."""
        began = time.perf_counter()
        self.wait()
        copied = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(manifest, copied), name="checkpoint")
        self._thread.start()
        self.stall_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Until everything is written. Raises `UserError` or `MachineError` when it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, manifest: Manifest, state: Mapping[str, Any]) -> None:
        try:
            write_checkpoint(self.directory, manifest, state)
            remove_old(self.directory, self.last)
            self.written += 1
        except UserError as error:
            self._error = error
        except MemoryError as error:
            self._error = machine_failure(error)
        except OSError as error:
            self._error = write_error(self.directory, error)
