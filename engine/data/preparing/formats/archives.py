"""Tar files from outside: only regular files of bounded size are read, and nothing is unpacked under its own name."""

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from bsnas.engine.data.contents import MAX_FILE_BYTES
from bsnas.engine.host.errors import UserError


def regular_members(
    archive: Path, handle: IO[bytes] | None = None, max_bytes: int = MAX_FILE_BYTES
) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """Members of a plain (not compressed) tar file, each with the reason why it cannot be used, or None.

    Directories are left out. `handle` is an open file in place of the archive itself: a tar file inside it. Raises
    UserError for what is no tar file.
    """
    try:
        with tarfile.open(archive if handle is None else None, "r:", fileobj=handle) as tar:
            for member in tar:
                if member.isdir():
                    continue
                yield member, _fault(member, max_bytes)
                tar.members = []  # type: ignore[attr-defined] # tarfile remembers every member; ImageNet has 1.3 million
    except tarfile.TarError as error:
        raise UserError(f"{archive} is no tar file or is cut off ({error}); bring it back") from None
    except OSError as error:
        raise UserError(f"{archive} cannot be read: {error.strerror or error}; mend or remove it") from None


def range_reader(archive: Path, offset: int, size: int) -> Callable[[], bytes]:
    """Reads a range of a file when called. Raises OSError."""

    def read() -> bytes:
        with open(archive, "rb") as handle:
            content = os.pread(handle.fileno(), size, offset)
        if len(content) != size:
            raise OSError(f"{archive.name} is cut off")
        return content

    return read


def stamp_of_archive(archive: Path, size: int) -> str:
    """Stamp of a member: its size and the archive's time."""
    return f"{size}:{archive.stat().st_mtime_ns}"


def _fault(member: tarfile.TarInfo, max_bytes: int) -> str | None:
    if member.issym() or member.islnk():
        return f"is a link to {member.linkname[:80]} in an archive"
    if not member.isreg():
        return "is no regular file of its archive"
    if member.sparse is not None:
        return "is a sparse file of its archive"
    if member.size > max_bytes:
        return f"has {member.size} bytes, more than {max_bytes}"
    return None
