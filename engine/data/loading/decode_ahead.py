"""Pipelines that decode in turn, each ahead of what was asked of it.

Every operator of a DALI pipeline ends at a barrier, where threads that are done wait for the last image. Two cores idle
for 8 % of the time under one pipeline of two threads, for 2 % under two pipelines of one (images of 256 pixels in
batches of 64, AMD EPYC family 26, 2026-11-25, 2c92e31).
"""

from collections import deque
from collections.abc import Callable

import torch
from nvidia.dali.pipeline import Pipeline

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.loading.decode import Batch, prefetch_depth, thread_count


def threads_per_pipeline(config: DataConfig, device: torch.device) -> list[int]:
    """All threads of the process in one pipeline on a GPU, which decodes itself, else in two halves.

    One pipeline too where only one batch is decoded ahead: each would only work while it is waited for.
    """
    threads = thread_count(config)
    if device.type == "cuda" or threads < 2 or prefetch_depth(config, device) < 2:
        return [threads]
    return [threads - threads // 2, threads // 2]


class DecodeAhead:
    """One of the pipelines: it decodes every `stride`-th batch, counted over all epochs."""

    def __init__(
        self, batch: Callable[[int], Batch], pipeline: Callable[[Callable[[], Batch]], Pipeline], stride: int
    ) -> None:
        """`batch(position)` is what to decode; `pipeline(source)` makes the pipeline that calls `source()` for it."""
        self._batch, self._stride = batch, stride
        self._next = 0
        self.ahead: deque[int] = deque()
        """Positions given to the pipeline and not yet received."""
        self._pipeline = pipeline(self._source)

    def run(self, position: int, stream: torch.cuda.Stream | None) -> tuple:  # type: ignore[type-arg]
        """The outputs for the batch at a position; after a jump, what was decoded ahead is dropped."""
        if position not in self.ahead:
            self._next = position
        outputs = self._pipeline.run(stream)
        while self.ahead.popleft() != position:
            outputs = self._pipeline.run(stream)
        return outputs

    def _source(self) -> Batch:
        """Called by DALI when it has room."""
        position = self._next
        self.ahead.append(position)
        self._next += self._stride
        return self._batch(position)
