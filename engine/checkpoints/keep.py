"""Which checkpoints of a directory are whole, which one a training goes on from, and which may go."""

import hashlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bsnas.engine.checkpoints.manifest import NAME, Checkpoint, Manifest, manifest_file, read_manifest
from bsnas.engine.host.errors import UserError


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


def _files(directory: Path) -> list[Path]:
    return [file for file in sorted(directory.glob("epoch-*.pt")) if NAME.fullmatch(file.stem)]


def _listed(directory: Path) -> list[Checkpoint]:
    """Checkpoints whose manifests can be read, the oldest first."""
    found = []
    for file in _files(directory):
        with suppress(UserError):
            found.append(Checkpoint(file, read_manifest(file)))
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.age)
