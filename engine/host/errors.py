"""Errors that a user can mend, and failures of the machine; engine/host/script.py turns them into a line. No torch."""

import errno
import os
import re
import sqlite3

EXIT_USER_ERROR = 2
EXIT_MACHINE_ERROR = 3


class UserError(ValueError):
    """Bad input: the message says what is wrong, what is allowed and what to do, in one line."""

    exit_code = EXIT_USER_ERROR
    told = False
    """Whether another process has shown it to the user."""


class MachineError(UserError):
    """The machine failed: no disk, no memory, a lost process. What was saved is intact and can be continued."""

    exit_code = EXIT_MACHINE_ERROR


_WAYS_OUT = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space or raise the quota",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EROFS: "choose a directory that can be written",
    errno.EACCES: "choose a directory that can be written",
    errno.EPERM: "choose a directory that can be written",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
    errno.ENOMEM: "free memory",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
}
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC(ATION)?_FAILED|std::bad_alloc"
    "|could not (create a primitive|create a memory object|execute a primitive)$",  # oneDNN says no more
    re.MULTILINE,
)
_LOST_KINDS = {"DistError", "DistNetworkError", "DistBackendError", "DistStoreError"}
"""Types of torch.distributed; gloo and NCCL also raise plain RuntimeErrors, which their words below tell."""
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "Timed out waiting",
    "timed out", "NCCL", "Gloo", "gloo", "Socket Timeout", "recvValue failed", "sendBytes failed",
)  # fmt: skip


def machine_failure(error: BaseException) -> MachineError | None:
    """The failure of the machine behind an exception, in one line; None when there is none and it must be a bug."""
    text = " ".join(str(error).split("\n", 1)[0].split())
    if is_out_of_memory(error):
        detail = text or "none is left"
        return MachineError(f"no memory: {detail}; end other programs or lower the batch size, then continue")
    if isinstance(error, OSError) and error.errno in _WAYS_OUT:
        where = f"{error.filename}: " if error.filename else ""
        return MachineError(f"{where}{os.strerror(error.errno)}; {_WAYS_OUT[error.errno]}, then continue")
    if isinstance(error, sqlite3.Error):
        return MachineError(f"the file of evaluations: {text}; free space or mend the file, then continue")
    lost = _kinds(error) & _LOST_KINDS or any(word in str(error) for word in _LOST)
    if isinstance(error, RuntimeError) and lost:
        return MachineError(f"another process of this run was lost or does not answer ({text[:160]}); continue the run")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, that of torch on a CPU or a GPU, or that of a library under it."""
    return (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in _kinds(error)
        or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None)
    )


def _kinds(error: BaseException) -> set[str]:
    """Names of an exception's types: torch's, without loading it."""
    return {kind.__name__ for kind in type(error).__mro__}


def first_line(error: Exception) -> str:
    """What an exception says, cut to one readable line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
