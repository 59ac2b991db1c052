"""Pipelines that decode in turn, each ahead of what was asked of it.

Every operator of a DALI pipeline ends at a barrier, where threads that are done wait for the last image. Two cores idle
for 8 % of the time under one pipeline of two threads, for 2 % under two pipelines of one thread.
"""

from collections import deque
from collections.abc import Callable

import torch
from nvidia.dali.pipeline import Pipeline

from engine.data import DataConfig
from engine.decode import Batch, thread_count


def threads_in_turn(config: DataConfig, device: torch.device) -> list[int]:
    """Threads of each pipeline: all in one on a GPU, which decodes itself, else those of the process in two halves."""
    threads = thread_count(config)
    return [threads] if device.type == "cuda" or threads < 2 else [threads - threads // 2, threads // 2]


class DecodeAhead:
    """One of the pipelines: it decodes every `turns`-th batch, counted over all epochs."""

    def __init__(
        self, batch: Callable[[int], Batch], pipeline: Callable[[Callable[[], Batch]], Pipeline], turns: int
    ) -> None:
        """`batch(position)` is what to decode; `pipeline(source)` makes the pipeline that calls `source()` for it."""
        self._batch, self._turns = batch, turns
        self._next = 0
        self._handed: deque[int] = deque()  # positions given to the pipeline and not yet received
        self._pipeline = pipeline(self._source)

    @property
    def ahead(self) -> list[int]:
        """Positions of the batches that the pipeline has."""
        return list(self._handed)

    def run(self, position: int, stream: torch.cuda.Stream | None) -> tuple:  # type: ignore[type-arg]
        """The outputs for the batch at a position; after a jump, what was decoded ahead is dropped."""
        if position not in self._handed:
            self._next = position
        outputs = self._pipeline.run(stream)
        while self._handed.popleft() != position:
            outputs = self._pipeline.run(stream)
        return outputs

    def _source(self) -> Batch:
        """Called by DALI when it has room."""
        position = self._next
        self._handed.append(position)
        self._next += self._turns
        return self._batch(position)
