"""Encoded images as they lie on the disk: files of their own, or ranges of larger ones (shards).

Ranges are read side by side, since a network file system answers late.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt
from PIL import Image

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


def unchanged_paths(files: FileList, places: Sequence[int]) -> list[bytes]:
    """Full paths of images that are files of their own, for a decoder to read.

    A native decoder that meets several unreadable headers in one batch can end the process, so that nothing may reach
    it that has changed since it was checked. Raises UserError for such an image.
    """
    paths = []
    for place in places:
        path = files.path(place)
        try:
            status = os.stat(path)
            if status.st_size != files.sizes[place] or status.st_mtime_ns > files.checked_at:
                _require_unchanged(files, place, status.st_mtime_ns, partial(read_file, path))
        except OSError as error:
            raise UserError(f"image {path} cannot be read ({error.strerror}); remove or replace it") from None
        paths.append(os.fsencode(path))
    return paths


def _what_became_of(content: bytes) -> str:
    """What to say of an image that is not the one that was checked."""
    if not content:
        return "is empty; remove or replace it"
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except Exception:  # Pillow's readers of damaged images raise all kinds
        return "is damaged or not an image; remove or replace it"
    return (
        "has changed since it was checked; bring it back, or start again, which checks it anew (after "
        "engine/prepare.py where that was used)"
    )


_SAME: set[tuple[str, int, int]] = set()
"""Files that were written after their check and hold what was checked: path, first byte, and time of that writing."""


def _require_unchanged(files: FileList, place: int, mtime: int, content: Callable[[], bytes]) -> None:
    """Compare an image with the digest of its check; once for each time that it is written."""
    offset = -1 if files.offsets is None else int(files.offsets[place])
    key = files.path(place), offset, mtime
    if key in _SAME:
        return
    found = content()
    if hashlib.sha256(found).hexdigest()[:32].encode() != files.digests[place]:
        raise UserError(f"image {files.describe(place)} {_what_became_of(found)}")
    _SAME.add(key)


def read_ranges(files: FileList, places: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
    """The contents of the images at `places`. Raises UserError for a file that is cut off, MachineError for others."""
    return list(_readers().map(lambda place: _read(files, place), places))


def _read(files: FileList, place: int) -> npt.NDArray[np.uint8]:
    assert files.offsets is not None
    size, path = int(files.sizes[place]), files.path(place)
    try:
        opened = _opened(path)  # held, so that the cache cannot close it meanwhile
        content = os.pread(opened.fileno(), size, int(files.offsets[place]))
        mtime = os.fstat(opened.fileno()).st_mtime_ns
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}; bring it back, then continue") from None
    if len(content) != size:
        raise UserError(f"{path} is cut off; bring it back, or run engine/prepare.py again")
    if mtime > files.checked_at:
        _require_unchanged(files, place, mtime, lambda: content)
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
