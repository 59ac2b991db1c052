"""What a training says about itself: sums over passes, the metrics file, TensorBoard, and the console."""

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bsnas.engine.host.console import activity_due, duration, note_activity, quiet

CLOCK_VALUES = ("time", "seconds", "images_per_s", "data_wait_share")
"""What depends on the clock in a line of metrics.jsonl; everything else is the same in an equal run."""


class Meter:
    """Loss, top-1 and speed since the last reading. Sums stay on the device; reading them synchronises."""

    def __init__(self, device: torch.device) -> None:
        # loss x images, correct, images; and images since this process began, which its speed counts
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.restart_clock(0.0)

    def restart_clock(self, wait_seconds: float) -> None:
        """Speed is that from now on; `wait_seconds` is the loader's total so far."""
        self._started, self._waited = time.perf_counter(), wait_seconds

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """One pass: mean loss [], logits [N, classes], labels [N]. One without a finite loss does not count.

        Of labels that are probabilities [N, classes] (mixup), the likeliest class counts.
        """
        if labels.ndim == 2:
            labels = labels.argmax(1)
        correct = (logits.argmax(1) == labels).sum()
        images = torch.full_like(correct, len(labels))
        values = torch.stack([loss.detach() * len(labels), correct, images, images]).double()
        self._sums += torch.where(loss.detach().isfinite(), values, 0.0)

    def state(self) -> Tensor:
        """The sums, for a checkpoint inside an epoch."""
        return self._sums

    def load(self, state: Tensor) -> None:
        self._sums.copy_(state)
        self._sums[3] = 0

    def read(self, wait_seconds: float) -> dict[str, float]:
        """Means over ranks since the last call, and images/s of all ranks; `wait_seconds` is the loader's total."""
        sums = self._sums.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        values = self._values(sums, wait_seconds)
        self._sums.zero_()
        self.restart_clock(wait_seconds)
        return values

    def peek(self, wait_seconds: float) -> dict[str, float]:
        """The same of this rank alone, and nothing is reset: for a live line. Images/s are scaled to all ranks."""
        values = self._values(self._sums, wait_seconds)
        if torch.distributed.is_initialized():
            values["images_per_s"] *= torch.distributed.get_world_size()
        return values

    def _values(self, sums: Tensor, wait_seconds: float) -> dict[str, float]:
        loss, correct, images, recent = sums.tolist()
        seconds = time.perf_counter() - self._started
        return {
            "loss": loss / max(images, 1),
            "top1": correct / max(images, 1),
            "images_per_s": recent / seconds,
            "data_wait_share": (wait_seconds - self._waited) / seconds,
            "seconds": seconds,
        }


class MetricsLog:
    """Appends to metrics.jsonl and TensorBoard; a resumed run first drops what lies past its checkpoint."""

    def __init__(self, file: Path, tensorboard: Path, *, resume_epoch: int, resume_bytes: int) -> None:
        """`resume_bytes`: how long the file was when the checkpoint was written."""
        from torch.utils.tensorboard import SummaryWriter

        if file.exists() and file.stat().st_size > resume_bytes:
            os.truncate(file, resume_bytes)
        self._file = open(file, "a", buffering=1)  # noqa: SIM115 - open as long as the training
        self._tensorboard = SummaryWriter(str(tensorboard), purge_step=resume_epoch + 1)

    def write(self, kind: str, epoch: int, values: dict[str, Any]) -> None:
        """One line; numbers also go to TensorBoard as `kind/name`, lists of numbers as histograms."""
        self._file.write(json.dumps({"kind": kind, "epoch": epoch, **values, "time": round(time.time(), 2)}) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, epoch)
            elif isinstance(value, list) and value and isinstance(value[0], float):
                self.distribution(f"{kind}/{name}", value, epoch)

    def distribution(self, tag: str, values: Sequence[float], epoch: int) -> None:
        """A histogram for TensorBoard alone, of values that have a file of their own."""
        if values:
            self._tensorboard.add_histogram(tag, torch.tensor(values), epoch)

    def bytes_written(self) -> int:
        """Length of the file, which is on the disk then: for a checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


class Reporter:
    """Progress of a training on the console of the main process: a line that renews itself, or one line per epoch."""

    def __init__(self, total_epochs: int, *, enabled: bool, doing: str = "training") -> None:
        self._total_epochs = total_epochs
        self._doing = doing
        self._enabled = enabled
        self._live = enabled and sys.stdout.isatty() and not quiet()
        self._began = time.time()
        self._first: int | None = None
        self._shown = 0.0

    def due(self) -> bool:
        """Whether a line or a note is due: at most every two seconds, since reading the meter synchronises."""
        return self._enabled and (self._live or activity_due()) and time.time() - self._shown > 2

    def show(self, epoch: float, values: dict[str, float], *, done: bool) -> None:
        """Epochs finished (a fraction inside an epoch) and the meter's values."""
        if not self._enabled:
            return
        now = self._shown = time.time()
        if self._first is None:
            self._first = math.ceil(epoch) - 1
        pace = (now - self._began) / (epoch - self._first) if epoch > self._first else 0
        note_activity(self._doing, epoch, self._total_epochs, unit="epochs", started=now - pace * epoch, **values)
        left = f"  left {duration(pace * (self._total_epochs - epoch))}" if pace else ""
        line = (
            f"epoch {epoch:6.1f}/{self._total_epochs}  loss {values['loss']:.4f}  top-1 {values['top1']:.4f}  "
            f"{values['images_per_s']:.0f} images/s  waiting for data {values['data_wait_share']:.1%}{left}"
        )
        if self._live:
            full = round(20 * epoch / self._total_epochs)
            bar = f"{'━' * full}{'╌' * (20 - full)} "
            print(f"\r\x1b[K{bar}{line}", end="\n" if done else "", flush=True)
        elif done:
            print(line, flush=True)

    def say(self, text: str) -> None:
        if self._enabled:
            print(f"\r\x1b[K{text}" if self._live else text, flush=True)
