"""Exclusive locks among processes: the system's, and files where a file system has none (many NFS mounts)."""

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bsnas.engine.host.errors import UserError

UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""What `flock` says where there are no locks."""
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
_ASKED_EVERY = 0.2


@contextmanager
def exclusive(handle: IO[Any], path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of an open file; it goes with the process.

    Where the file system has no locks, the file PATH.held stands for one: it is left behind by a process that is
    killed, and taken over once that is dead, which only its own machine can tell.

    Raises BlockingIOError when another holds it and `wait` is off, `UserError` when there can be no lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in TAKEN:
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno not in UNSUPPORTED:
            raise UserError(f"{path} cannot be locked: {error.strerror}; choose a directory on another disk") from None
    else:
        yield
        return
    held = held_file(path)
    while not _take(held):
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, f"{held} is held")
        time.sleep(_ASKED_EVERY)
    try:
        yield
    finally:
        with suppress(OSError):
            held.unlink()


def held_file(path: Path) -> Path:
    """The file that stands for the lock of `path` where there are no locks."""
    return path.with_name(f"{path.name}.held")


def is_held(path: Path) -> bool:
    """Whether somebody holds a lock by file; one of another machine counts as alive, since it cannot be asked."""
    try:
        return not _is_stale(held_file(path).read_text())
    except OSError:
        return False


def _take(held: Path) -> bool:
    try:
        with suppress(FileNotFoundError):
            if _is_stale(held.read_text()):
                held.unlink()
        descriptor = os.open(held, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{held} cannot be made: {error.strerror}; choose a directory that can be written") from None
    with os.fdopen(descriptor, "w") as handle:
        handle.write(f"{os.getpid()} on {socket.gethostname()}\n")
    return True


def _is_stale(owner: str) -> bool:
    match = re.fullmatch(r"(\d+) on (\S+)\n", owner)
    return match is not None and match[2] == socket.gethostname() and not lives(int(match[1]))


def lives(pid: int) -> bool:
    """Whether this machine has such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
