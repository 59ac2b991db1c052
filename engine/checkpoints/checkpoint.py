"""Checkpoints: everything that a training needs to continue, in one file, and a manifest that proves it whole.

NAME.pt is written under another name, brought to the disk and renamed, and then its manifest NAME.json likewise: size,
SHA-256, how far the training was, and what it belongs to. A file without a manifest that fits is damaged. Files are
read with `weights_only`, which runs no code from them. `CheckpointWriter` writes beside the training.
"""

import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bsnas.engine.checkpoints.tensor_file import read_tensors, write_tensors
from bsnas.engine.config import from_json
from bsnas.engine.host.atomic import write_atomically, write_error
from bsnas.engine.host.errors import MachineError, UserError, machine_failure
from bsnas.engine.runs.rundir import json_bytes, read_json
from bsnas.engine.space.space import Space

FORMAT = 2
"""Version of the layout of both files."""
_NAME = re.compile(r"epoch-\d{4,}(-pass-\d+)?(-shrunk-\d+)?", re.ASCII)


@dataclass
class Progress:
    """How far a training is."""

    epoch: int = 0
    """Epochs finished."""
    rounds: int = 0
    """Rounds of paths finished."""
    paths: int = 0
    """Paths of the round under way that have made their optimizer step."""
    first_round: int = 0
    """Rounds that were finished when the epoch began."""
    passes: int = 0
    """Forward-backward passes over an image batch."""
    batches: int = 0
    """Image batches taken from the loader."""
    shrink_steps: int = 0
    """Shrink steps finished."""
    skipped: int = 0
    """Optimizer steps left out because a loss or a gradient was not finite."""
    skipped_in_a_row: int = 0
    """Those since the last step that was made."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if type(value) is not int or not 0 <= value < 2**53:
                raise UserError(f"progress {name} is {value!r}; it must be a whole number of at least 0")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What belongs to a checkpoint's file, and what the file belongs to."""

    format: int
    bytes: int
    sha256: str
    progress: Progress
    whole_epoch: bool
    """Written between epochs: another number of processes can continue from here."""
    kept: bool
    """Never removed: written at a shrink step or at the end."""
    processes: int
    device: str
    """Name of the device that computed."""
    data: str
    """Fingerprint of the data set and its split."""

    def __post_init__(self) -> None:
        if self.bytes < 1 or self.processes < 1 or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UserError(f"a manifest tells of {self.bytes} bytes, {self.processes} processes, {self.sha256!r:.70}")

    @property
    def age(self) -> tuple[int, int, int]:
        """Grows with the training."""
        return self.progress.epoch, self.progress.passes, self.progress.shrink_steps


@dataclass(frozen=True)
class Checkpoint:
    """A file and its manifest."""

    file: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Written:
    """What the writer is told about a checkpoint besides its state."""

    progress: Progress
    whole_epoch: bool = True
    kept: bool = False
    processes: int = 1
    device: str = "cpu"
    data: str = ""

    @property
    def name(self) -> str:
        progress = self.progress
        inside = "" if self.whole_epoch else f"-pass-{progress.passes:08d}"
        shrunk = f"-shrunk-{progress.shrink_steps}" if progress.shrink_steps else ""
        return f"epoch-{progress.epoch:04d}{inside}{shrunk}"


# ---- writing


def write_checkpoint(directory: Path, about: Written, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and its manifest, whole or not at all. Raises `UserError` or `MachineError` when it cannot."""
    file = directory / f"{about.name}.pt"
    try:
        size, digest = write_tensors(file, {"format": FORMAT, **state})
        fields = asdict(Manifest(format=FORMAT, bytes=size, sha256=digest, **_fields(about)))
        write_atomically(manifest_file(file), json_bytes({**fields, "check": _check(fields)}))
    except OSError as error:
        raise _cannot_write(file, write_error(file, error)) from None
    except MachineError as error:
        raise _cannot_write(file, error) from None
    return file


def _cannot_write(file: Path, error: UserError) -> UserError:
    reason = str(error).split(": ", 1)[-1].split(";", 1)[0]
    return type(error)(f"checkpoint {file} cannot be written: {reason}; free space and continue with --resume")


def _check(fields: Mapping[str, Any]) -> str:
    """Tells a manifest that was changed; of a file that was changed, its own SHA-256 tells."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _fields(about: Written) -> dict[str, Any]:
    return {name: getattr(about, name) for name in about.__dataclass_fields__}


def remove_old(directory: Path, last: int) -> None:
    """Remove all but the `last` newest checkpoints, those that are kept for good, and the newest between epochs.

    What a killed process left without a manifest goes too.
    """
    for file in _files(directory):
        if not manifest_file(file).exists():
            file.unlink(missing_ok=True)
    found = _listed(directory)
    wanted = {c.file for c in found[-last:]} | {c.file for c in found if c.manifest.kept}
    wanted |= {c.file for c in [c for c in found if c.manifest.whole_epoch][-1:]}
    for checkpoint in found:
        if checkpoint.file not in wanted:
            manifest_file(checkpoint.file).unlink(missing_ok=True)
            checkpoint.file.unlink(missing_ok=True)


def set_newer_aside(chosen: Checkpoint) -> None:
    """Move what is newer than the checkpoint that a training goes on from out of its way: damaged or of another end."""
    aside = chosen.file.parent / "set-aside"
    for checkpoint in _listed(chosen.file.parent):
        if checkpoint.manifest.age > chosen.manifest.age:
            aside.mkdir(exist_ok=True)
            for file in (checkpoint.file, manifest_file(checkpoint.file)):
                with suppress(FileNotFoundError):
                    os.replace(file, aside / file.name)


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
            if _NAME.fullmatch(file.stem):
                file.unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the last write failed; `wait` says why."""
        return self._error is not None

    def save(self, about: Written, state: Mapping[str, Any]) -> None:
        """Copy the state and write it beside the training. Raises what the write before raised."""
        began = time.perf_counter()
        self.wait()
        copied = snapshot(state)
        self._thread = threading.Thread(target=self._write, args=(about, copied), name="checkpoint")
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

    def _write(self, about: Written, state: Mapping[str, Any]) -> None:
        try:
            write_checkpoint(self.directory, about, state)
            remove_old(self.directory, self.last)
            self.written += 1
        except UserError as error:
            self._error = error
        except MemoryError as error:
            self._error = machine_failure(error)
        except OSError as error:
            self._error = write_error(self.directory, error)


def save_checkpoint(
    directory: Path, space: Space, progress: Progress, state: dict[str, Any], keep: set[int], last: int = 2
) -> Path:
    """Write the checkpoint of an epoch at once; older ones go, except those of the epochs in `keep`."""
    about = Written(progress=progress, kept=progress.epoch in keep)
    file = write_checkpoint(directory, about, {"space": space.to_json(), "progress": asdict(progress), **state})
    remove_old(directory, last)
    return file


# ---- reading


def manifest_file(file: Path) -> Path:
    return file.with_suffix(".json")


def newest_checkpoint(
    directory: Path,
    accept: Callable[[Manifest], bool] = lambda _: True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Checkpoint | None:
    """The newest whole checkpoint that is accepted, or None when there are none; damaged ones are skipped and told.

    Raises `UserError` when there are some and all are damaged.
    """
    damaged: list[str] = []
    candidates: list[Checkpoint] = []
    for file in _files(directory):
        try:
            candidates.append(Checkpoint(file, read_manifest(file)))
        except UserError as error:
            say(f"checkpoint skipped: {error}")
            if manifest_file(file).exists():  # else a killed process did not finish it
                damaged.append(str(error))
    candidates.sort(key=lambda checkpoint: checkpoint.manifest.age)
    for checkpoint in reversed([c for c in candidates if accept(c.manifest)]):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint
        damaged.append(reason)
        say(f"checkpoint skipped: {reason}")
    if damaged:
        raise UserError(
            f"no checkpoint in {directory} can be read ({len(damaged)} damaged, the last: {damaged[-1]}); "
            "restore one, or start anew in another --run"
        )
    return None


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint between epochs, or None when there is none yet."""
    found = newest_checkpoint(directory, lambda manifest: manifest.whole_epoch)
    return found.file if found else None


def read_manifest(file: Path) -> Manifest:
    """The manifest of a checkpoint. Raises `UserError` when it is missing, damaged or of another format."""
    source = manifest_file(file)
    if not source.is_file():
        raise UserError(f"{file} has no manifest {source.name}; it was not finished, or is of an older version")
    content = read_json(source)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{source} is no manifest of format {FORMAT}; use a checkpoint that this version wrote")
    if content.pop("check", None) != _check(content):
        raise UserError(f"{source} has changed since it was written")
    return from_json(Manifest, content, source)


def damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the file, or None when it is what was written."""
    file, manifest = checkpoint.file, checkpoint.manifest
    try:
        size = file.stat().st_size
        if size != manifest.bytes:
            return f"{file} has {size} bytes instead of {manifest.bytes}"
        digest = hashlib.sha256()
        with open(file, "rb") as handle:
            while block := handle.read(1 << 22):
                digest.update(block)
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    return None if digest.hexdigest() == manifest.sha256 else f"{file} has changed since it was written (SHA-256)"


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


def load_checkpoint(file: Path, full_space: Space) -> tuple[Space, Progress, dict[str, Any]]:
    """(space at that time, progress, everything else). Raises `UserError` for a damaged file or another space's."""
    state = read_state(file)
    try:
        space = Space.from_json(state.pop("space", None))
    except UserError as error:
        raise UserError(f"checkpoint {file}: {error}") from None
    progress = take_progress(state, file)
    if space.fingerprint != full_space.fingerprint:
        raise UserError(
            f"checkpoint {file} belongs to another search space than the run's: {_difference(space, full_space)}; "
            "use the run's own files"
        )
    return space, progress, state


def take_progress(state: dict[str, Any], file: Path) -> Progress:
    """Take the progress out of a state. Raises `UserError` when it is none."""
    values = state.pop("progress", None)
    if not isinstance(values, dict) or values.keys() != Progress().__dict__.keys():
        raise UserError(f"{file} says nothing of a training's progress; use the run's own files")
    return Progress(**values)


def _difference(theirs: Space, ours: Space) -> str:
    """The first entry of two tables that differs."""
    own, other = ours.to_json(), theirs.to_json()
    for name in own:
        if name != "live" and own[name] != other[name]:
            if name == "clusters" and len(own[name]) == len(other[name]):
                pairs = zip(own[name], other[name], strict=True)
                j = next(j for j, (a, b) in enumerate(pairs) if a != b)
                key = next(key for key in own[name][j] if own[name][j][key] != other[name][j][key])
                return f"{key} of cluster {j + 1} is {other[name][j][key]} there and {own[name][j][key]} here"
            if name == "clusters":
                return f"{len(other[name])} clusters there and {len(own[name])} here"
            return f"{name} is {other[name]} there and {own[name]} here"
    return "the tables differ"


def _files(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.glob("epoch-*.pt")) if _NAME.fullmatch(file.stem)]


def _listed(directory: Path) -> list[Checkpoint]:
    """Checkpoints whose manifests can be read, the oldest first."""
    found = []
    for file in _files(directory):
        with suppress(UserError):
            found.append(Checkpoint(file, read_manifest(file)))
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.age)
