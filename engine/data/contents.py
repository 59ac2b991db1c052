"""Encoded images as they lie on the disk: files of their own, or ranges of larger ones (shards).

Ranges are read side by side, since a network file system answers late.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.errors import MachineError, UserError

READERS = 16
OPEN_FILES = 256
MAX_FILE_BYTES = 512 * 2**20


def read_file(path: str) -> bytes:
    """The content of a file. Raises OSError, for one that is too large as well."""
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, more than {MAX_FILE_BYTES}")
        return handle.read()


def read_image(files: FileList, index: int) -> bytes:
    """The content of one image of a list."""
    return read_file(files.path(index)) if files.offsets is None else read_ranges(files, [index])[0].tobytes()


def read_ranges(files: FileList, places: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """The contents of the images at `places`. Raises UserError for a file that is cut off, MachineError for others."""
    return list(_readers().map(lambda place: _read(files, place), places))


def _read(files: FileList, place: int) -> npt.NDArray[np.uint8]:
    assert files.offsets is not None
    size, path = int(files.sizes[place]), files.path(place)
    try:
        opened = _opened(path)  # held, so that the cache cannot close it meanwhile
        content = os.pread(opened.fileno(), size, int(files.offsets[place]))
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}; bring it back, then continue") from None
    if len(content) != size:
        raise UserError(f"{path} is cut off; bring it back, or run engine/prepare.py again")
    return np.frombuffer(content, np.uint8)


class _File:
    """A descriptor that lives as long as somebody holds it."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        return self._descriptor

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@lru_cache(OPEN_FILES)
def _opened(path: str) -> _File:
    return _File(path)


@lru_cache(1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="shard-reader")
