"""Files of tensors: written whole or not at all, and read without running or believing anything in them."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from bsnas.engine.checkpoints.old_names import with_present_names
from bsnas.engine.host.atomic import sync_directory
from bsnas.engine.host.errors import UserError


def write_tensors(file: Path, content: Mapping[str, Any]) -> tuple[int, str]:
    """Write nested dictionaries of tensors and plain data; (bytes, SHA-256) of the file.

    They go to a temporary name, to the disk, and are renamed. Raises `OSError` when that fails; nothing is left then.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    try:
        with open(temporary, "wb", buffering=0) as handle:
            hashed = _HashedFile(handle)
            torch.save(dict(content), cast(IO[bytes], hashed))
            if hashed.error is not None:
                raise hashed.error
            os.fsync(handle.fileno())
        os.replace(temporary, file)
        sync_directory(file.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return hashed.size, hashed.digest.hexdigest()


class _HashedFile:
    """Hashes what is written. A failure is kept instead of raised: torch's writer would end the process over it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.digest = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size += len(view)
        written = 0
        try:
            while self.error is None and written < len(view):
                written += self._handle.write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def flush(self) -> None:
        """Nothing is buffered."""


def read_tensors(file: Path) -> Any:
    """What `write_tensors` wrote, on the CPU. Raises `ValueError` with the reason when it cannot be read.

    No code in the file runs (`weights_only`), and it cannot grow on being read: its parts are stored as they are.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("its parts are compressed, which this program never does")
            if sum(part.file_size for part in archive.infolist()) > file.stat().st_size:
                raise ValueError("its parts are larger than the file")
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds for a damaged file
        raise ValueError((str(error) or type(error).__name__).splitlines()[0]) from None


def load_weights(network: nn.Module, weights: Any, file: Path) -> None:
    """Fill a network in. Raises `UserError` unless names, shapes and types are exactly the network's."""
    expected = network.state_dict()
    weights = with_present_names(weights, expected)
    if not isinstance(weights, Mapping) or weights.keys() != expected.keys():
        given = set(weights) if isinstance(weights, Mapping) else set()
        names = sorted(map(str, given ^ set(expected)))
        raise UserError(f"{file} holds no weights of this network ({', '.join(names[:3])}); use the run's own files")
    for name, own in expected.items():
        check_tensor(weights[name], like=own, name=name, file=file)
    network.load_state_dict(weights)


def check_tensor(value: Any, *, like: Tensor, name: str, file: Path) -> None:
    """Raise `UserError` unless a value is a tensor of that shape and type."""
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{name} in {file} is {got}; it must be {like.dtype} {list(like.shape)}; use the run's own files"
        )


def take(content: Mapping[str, Any], name: str, kind: type, file: Path) -> Any:
    """An entry of a file. Raises `UserError` when it is missing, of another type, or a negative whole number."""
    value = content.get(name)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        got = "missing" if value is None else f"{value!r:.40} instead of {kind.__name__}"
        raise UserError(f"{name} in {file} is {got}; use the run's own files")
    return value


def take_numbers(content: Mapping[str, Any], name: str, file: Path) -> dict[str, float]:
    """A dictionary of names and numbers. Raises `UserError` when it is something else."""
    values = take(content, name, dict, file)
    for key, value in values.items():
        if type(key) is not str or type(value) not in (int, float):
            raise UserError(f"{name} in {file} holds {value!r:.40} for {key!r:.40}; names and numbers belong there")
    return values
