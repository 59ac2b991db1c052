"""Being told to stop: SIGTERM and SIGINT end a process at the next moment at which nothing is lost. No torch.

Outside `deferred()` that moment is at once: whatever is finished is in files already. Inside it, as in training, the
signal is only noted, and the loop asks `requested()` after each step. A second signal ends the process where it is.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CONTINUE = 75
"""Exit code of a process that was told to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""
SAME_REQUEST_SECONDS = 1.0
"""Launchers pass a signal on to processes that got it from the terminal already; so close together it is the same."""


class Preempted(SystemExit):
    """The process stops because it was told to. `message` says what is saved."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CONTINUE)
        self.message = message

    def __str__(self) -> str:
        return self.message


class _State:
    """Of this process: signals arrive once per process."""

    signal_name: str | None = None
    first = 0.0
    deferred = 0


def handle_signals() -> None:
    """Answer SIGTERM and SIGINT from now on, unless the process was started with them ignored."""
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.signal_name is None:
        _State.signal_name, _State.first = signal.Signals(number).name, now
    elif now - _State.first > SAME_REQUEST_SECONDS:
        os.write(2, b"a second signal: ended at once; the newest checkpoint is whole\n")
        os._exit(EXIT_CONTINUE)
    else:
        return
    if not _State.deferred:
        raise Preempted(f"stopped by {_State.signal_name}; what was finished is kept, the same command continues")


def requested() -> bool:
    """Whether this process was told to stop."""
    return _State.signal_name is not None


def signal_name() -> str:
    """What told it; on another rank than the one that was told, a word for that."""
    return _State.signal_name or "a signal to another process"


@contextmanager
def deferred() -> Iterator[None]:
    """Note a signal instead of raising `Preempted`; who enters here asks `requested()`."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1


def forget() -> None:
    """As if no signal had come: for tests."""
    _State.signal_name = None
