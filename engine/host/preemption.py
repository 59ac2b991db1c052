"""Being told to stop: SIGTERM and SIGINT end a process at the next moment at which nothing is lost. No torch.

While a script starts, that moment is at once. Outside `deferred()` it is, too: whatever is finished is in files
already. Inside it, as in training and scoring, the signal is only noted, and the loop asks `requested()` after each
step. A second signal ends the process where it is, and so does a thread when the first one finds no answer for
`GRACE_SECONDS`: a process that waits in a library, as for a rank that died, would not notice it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CONTINUE = 75
"""Exit code of a process that was told to stop and can be continued (EX_TEMPFAIL of sysexits.h)."""
SAME_REQUEST_SECONDS = 1.0
"""Launchers pass a signal on to processes that got it from the terminal already; so close together it is the same."""
GRACE_SECONDS = 25.0
"""Launchers kill 30 s after they told to stop."""
_TOLD = (signal.SIGTERM, signal.SIGINT)


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
    started = False
    """Whether the script's imports are done and `bsnas.engine.host.script.run` turns `Preempted` into a line."""
    saving = False


def handle_signals() -> None:
    """Answer SIGTERM and SIGINT from now on, unless the process was started with them ignored.

    Scripts call this before their imports, which take seconds.
    """
    if any(signal.getsignal(number) is _receive for number in _TOLD):
        return
    read, write = os.pipe()
    for end in (read, write):
        os.set_blocking(end, end == read)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)  # written at once, whatever the main thread does
    threading.Thread(target=_insist, args=(read,), name="preemption", daemon=True).start()
    for number in _TOLD:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def started() -> None:
    """The script's imports are done: from now on a signal raises `Preempted`."""
    _State.started = True


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _State.signal_name is None:
        _State.signal_name, _State.first = signal.Signals(number).name, now
    elif now - _State.first > SAME_REQUEST_SECONDS:
        _end("a second signal: ended at once; the newest checkpoint is whole")
    else:
        return
    if not _State.started:
        _end(f"stopped by {_State.signal_name} while starting; the same command continues")
    if not _State.deferred:
        raise _stopped()


def _insist(wakeups: int) -> None:
    """End the process when a signal has not ended it for `GRACE_SECONDS`; what it saves just then is waited for."""
    while True:
        if os.read(wakeups, 1)[0] in _TOLD:
            time.sleep(GRACE_SECONDS)
            if not _State.saving:
                _end(f"no answer to a signal for {GRACE_SECONDS:.0f} s: ended; the newest checkpoint is whole")


def _end(line: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # messages of libraries may have taken file descriptor 2
        os.write(sys.stderr.fileno(), f"{line}\n".encode())
    os._exit(EXIT_CONTINUE)


def _stopped() -> Preempted:
    continues = "what was finished is kept, the same command continues, a training with --resume"
    return Preempted(f"stopped by {signal_name()}; {continues}")


def requested() -> bool:
    """Whether this process was told to stop."""
    return _State.signal_name is not None


def stop_here(agreed: bool = False) -> None:
    """Raise `Preempted` when told to stop, or when ranks `agreed` to: at a moment at which nothing is lost."""
    if agreed or requested():
        raise _stopped()


def signal_name() -> str:
    """What told it; on another rank than the one that was told, a word for that."""
    return _State.signal_name or "a signal to another process"


@contextmanager
def deferred() -> Iterator[None]:
    """Note a signal instead of raising `Preempted`; who enters here asks `requested()`.

    What nobody asked for until the end is raised there.
    """
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
    if not _State.deferred:
        stop_here()


@contextmanager
def saving() -> Iterator[None]:
    """What must not be cut off after `GRACE_SECONDS`: the launcher may grant more."""
    _State.saving = True
    try:
        yield
    finally:
        _State.saving = False


def forget() -> None:
    """As if no signal had come: for tests."""
    _State.signal_name = None
