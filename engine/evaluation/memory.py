"""How much memory an evaluation may use."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import psutil
import torch

from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.host.errors import UserError, is_out_of_memory

Result = TypeVar("Result")

MIB = 1 << 20

CPU_WORKSPACE = 4 * MIB
"""Inputs and hidden activations of one kernel call on a CPU: what stays in cache."""
CPU_ACTIVATIONS = 64 * MIB
"""Outputs of unfinished nodes on a CPU: more gives larger batches, less stays in cache."""
CPU_CHUNK = 128
GPU_CHUNK = 512
"""Most images of one pass through the tree: larger batches run no faster."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """A budget and its division; the parts, those of all workers together, never exceed it."""

    activations: int
    """Bytes for outputs of nodes whose subtrees are not finished."""
    workspace: int
    """Bytes for inputs and hidden activations of one kernel call."""
    statistics: int
    """Bytes for recalibrated statistics."""
    images: int
    """Bytes for the evaluation set as uint8; a larger one stays in host memory."""
    max_chunk: int
    """Most images of one pass through the tree."""

    @classmethod
    def plan(cls, device: torch.device, budget_mib: int | None, workers: int) -> "Memory":
        """Divide a budget, by default half of the free memory; activations and workspace are for each worker.

        Raises `UserError` for a budget that is not positive.
        """
        if budget_mib is not None and budget_mib < 1:
            raise UserError(f"a memory budget of {budget_mib} MiB is impossible; give at least 1, or none")
        budget = budget_mib * MIB if budget_mib else _free_bytes(device) // 2
        if device.type == "cpu":
            return cls(
                activations=min(budget // 2 // workers, CPU_ACTIVATIONS),
                workspace=min(budget // 4 // workers, CPU_WORKSPACE),
                statistics=budget // 4,
                images=0,
                max_chunk=CPU_CHUNK,
            )
        quarter = budget // 4
        return cls(activations=quarter, workspace=quarter, statistics=quarter, images=quarter, max_chunk=GPU_CHUNK)

    def halved(self, times: int) -> "Memory":
        """For one who ran out of memory so often: less for activations and workspace, and fewer images."""
        return replace(
            self,
            activations=self.activations >> times,
            workspace=self.workspace >> times,
            max_chunk=max(1, self.max_chunk >> times),
        )

    def chunk_images(self, tree: PrefixTree, itemsize: int) -> int:
        """How many images go through a tree at once: as many as let a whole level stay in memory, a power of two.

        A tree too wide for 16 images at once is cut into ranges of nodes instead (engine/evaluation/walk.py).
        """
        widest = max(sum(step.outputs for step in level.steps) * level.out_size**2 * itemsize for level in tree.levels)
        fitting = self.activations // (2 * widest)
        smallest = 16 if self.max_chunk == GPU_CHUNK else self.max_chunk
        return max(min(1 << max(fitting, 1).bit_length() - 1, self.max_chunk), smallest)


class Budget:
    """The memory that an evaluation may use: half from each time on that it ran out. Threads may share it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.halvings = 0

    def fit(self, work: Callable[[Memory, int], Result], too_large: str) -> Result:
        """`work(memory, halvings)` with this memory, or with half of it, and so on.

        Raises `UserError` of that text when there is nothing left to halve.
        """
        while True:
            halvings = self.halvings
            memory = self._memory.halved(halvings)
            try:
                return work(memory, halvings)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out here the error is gone, and with it what its traceback held.
            if memory.max_chunk == 1 and memory.activations < MIB:
                raise UserError(too_large)
            self.halvings = max(self.halvings, halvings + 1)  # another thread may have been first
            torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch keeps for later is free, too. Given back and asked for, rather than added up: torch's figures also
        # count what captured graphs use when they are replayed.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
