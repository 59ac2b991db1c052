"""Files and directories that appear whole or not at all, with any number of processes asking at once."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bsnas.engine.host.errors import MachineError, UserError
from bsnas.engine.host.locks import exclusive


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` among processes; it is released when the process ends in any way."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("w")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; set cache_dir to a directory that can be written"
        ) from None
    with handle, exclusive(handle, path, wait=True):
        yield


def write_atomically(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file under another name, to the disk, and rename it: readers see all of it or nothing.

    `durable=False` does not wait for the disk: for files that nobody needs after a power failure.
    Raises `UserError` for a place that cannot be written and `MachineError` when the disk is full or fails.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            handle.write(content)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(path, error) from None


def write_error(path: Path, error: OSError) -> UserError:
    """What to raise when a file cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return MachineError(f"cannot write {path}: {error.strerror}; free space on its disk, then continue")
    return UserError(f"cannot write {path}: {error.strerror}; choose a directory that can be written")


def sync_directory(directory: Path) -> None:
    """Make renames in a directory last through a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    with suppress(OSError):  # some network file systems have no such call; the rename itself is done
        os.fsync(descriptor)
    os.close(descriptor)


def build_directory(final: Path, build: Callable[[Path], None]) -> Path:
    """Make `final` by `build(temporary directory)` and one rename, unless it is there already."""
    with locked(final.parent / f".{final.name}.lock"):
        if not final.is_dir():
            work = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
            try:
                build(work)
                os.rename(work, final)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return final
