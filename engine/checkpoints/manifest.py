"""What belongs to a checkpoint: how far the training was, what the file is part of, and what proves it whole.

NAME.json is the manifest of NAME.pt. A file without a manifest that fits is damaged.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bsnas.engine.config import from_json
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import json_bytes, read_json

FORMAT = 2
"""Version of the layout of both files."""
NAME = re.compile(r"epoch-\d{4,}(-pass-\d+)?(-shrunk-\d+)?", re.ASCII)


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

    format: int = FORMAT
    bytes: int = 0
    """Size of the file; 0 before it is written."""
    sha256: str = ""
    progress: Progress
    whole_epoch: bool = True
    """Written between epochs: another number of processes can continue from here."""
    kept: bool = False
    """Never removed: written at a shrink step or at the end."""
    processes: int = 1
    device: str = "cpu"
    """Name of the device that computed."""
    data: str = ""
    """Fingerprint of the data set and its split."""

    def __post_init__(self) -> None:
        written = (self.bytes, self.sha256) != (0, "")
        if self.processes < 1 or (written and (self.bytes < 1 or not re.fullmatch("[0-9a-f]{64}", self.sha256))):
            raise UserError(f"a manifest tells of {self.bytes} bytes, {self.processes} processes, {self.sha256!r:.70}")

    @property
    def name(self) -> str:
        """Of both files, without suffix."""
        progress = self.progress
        inside = "" if self.whole_epoch else f"-pass-{progress.passes:08d}"
        shrunk = f"-shrunk-{progress.shrink_steps}" if progress.shrink_steps else ""
        return f"epoch-{progress.epoch:04d}{inside}{shrunk}"

    @property
    def age(self) -> tuple[int, int, int]:
        """Grows with the training."""
        return self.progress.epoch, self.progress.passes, self.progress.shrink_steps


@dataclass(frozen=True)
class Checkpoint:
    """A file and its manifest."""

    file: Path
    manifest: Manifest


def manifest_file(file: Path) -> Path:
    return file.with_suffix(".json")


def write_manifest(file: Path, manifest: Manifest) -> None:
    fields = asdict(manifest)
    write_atomically(manifest_file(file), json_bytes({**fields, "check": _check(fields)}))


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


def _check(fields: Mapping[str, Any]) -> str:
    """Tells a manifest that was changed; of a file that was changed, its own SHA-256 tells."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
