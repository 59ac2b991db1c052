"""Files and directories that appear whole or not at all, with any number of processes asking at once."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UserError


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
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it: readers see all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            handle.write(content)
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(handle.fileno(), 0o666 & ~umask)  # as open() would; temporary files are private
        os.replace(handle.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a directory that can be written") from None


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
