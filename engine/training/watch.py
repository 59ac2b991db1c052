"""What a training notices between two optimizer steps, on all ranks alike.

That it was told to stop, that a checkpoint is due, and steps that were skipped because a number was none. With several
ranks, each adds its notes to the gradients that are averaged anyway, so nothing is sent besides. On a GPU the notes of
a step are read after the next one: the host never waits for work that it has just handed over.
"""

import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from bsnas.engine.checkpoints.checkpoint import CheckpointWriter
from bsnas.engine.checkpoints.manifest import Progress
from bsnas.engine.config import SafetyConfig
from bsnas.engine.host import preemption
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError

_STOP, _SAVE, _RANKS = 0, 1, 2
"""Places in the notes; after them, for each rank, whether its loss was not finite."""

Describe = Callable[[list[int]], str]
"""Epoch, step, path and images of a step, given the ranks whose loss was not finite."""


class Watch:
    """Counts skipped steps in `progress`; `stop` and `save` say what to do after a step, equally on all ranks."""

    def __init__(self, process: Process, safety: SafetyConfig, writer: CheckpointWriter, progress: Progress) -> None:
        self.process = process
        self.safety = safety
        self.writer = writer
        self.progress = progress
        self._saved = time.monotonic()
        self._agreed_stop = self._agreed_save = False
        self._pending: deque[tuple[Tensor, torch.cuda.Event | None, Describe]] = deque()

    # ---- asked after each step

    @property
    def stop(self) -> bool:
        """Whether all ranks are to save and end now."""
        return self._agreed_stop if self.process.world_size > 1 else self._wants_stop()

    @property
    def save(self) -> bool:
        """Whether a checkpoint inside the epoch is due."""
        return self._agreed_save if self.process.world_size > 1 else self._wants_save()

    def saved(self) -> None:
        """A checkpoint was taken: the next is due an interval later."""
        self._saved = time.monotonic()
        self._agreed_save = False

    def _wants_stop(self) -> bool:
        return preemption.requested() or self.writer.failed

    def _wants_save(self) -> bool:
        due = time.monotonic() - self._saved >= 60 * self.safety.checkpoint_minutes
        return due and not self.writer.busy

    # ---- around each step

    def notes(self, loss_is_bad: Tensor) -> Tensor | None:
        """This rank's notes to be averaged with the gradients; None when there is no other rank."""
        if self.process.world_size == 1:
            return None
        notes = torch.zeros(_RANKS + self.process.world_size, device=self.process.device)
        notes[_RANKS + self.process.rank] = loss_is_bad
        if self._wants_stop():
            notes[_STOP] = 1
        if self.process.is_main and self._wants_save():
            notes[_SAVE] = 1
        return notes

    def observe(self, bad: Tensor, notes: Tensor | None, describe: Describe) -> None:
        """Take in the averaged notes of a step, and whether it was skipped. Raises `UserError` after too many."""
        values = bad if notes is None else torch.cat([bad, notes])
        event = None
        if values.is_cuda:
            values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((values, event, describe))
        while len(self._pending) > (0 if event is None else 1):
            self._take(*self._pending.popleft())

    def settle(self) -> None:
        """Take in the steps whose notes were not read yet: before anything counts them."""
        while self._pending:
            self._take(*self._pending.popleft())

    def _take(self, values: Tensor, event: torch.cuda.Event | None, describe: Describe) -> None:
        if event is not None:
            event.synchronize()
        bad, *notes = values.tolist()
        if notes:
            self._agreed_stop = self._agreed_stop or notes[_STOP] > 0
            self._agreed_save = self._agreed_save or notes[_SAVE] > 0
        if not bad:
            self.progress.skipped_in_a_row = 0
            return
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        if self.progress.skipped_in_a_row >= self.safety.max_skipped:
            ranks = [rank for rank, note in enumerate(notes[_RANKS:]) if note > 0]
            raise UserError(
                f"loss or gradient is not finite {self.progress.skipped_in_a_row} steps in a row, last in "
                f"{describe(ranks)}; the newest checkpoint is intact: lower --optimizer.learning-rate, look at the "
                "images, or raise --safety.max-skipped and continue"
            )
