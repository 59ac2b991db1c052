"""The process that this is: its rank, its device, and what all ranks do together through DeepSpeed's launcher."""

import logging
import os
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import nn

from bsnas.engine.host import launcher
from bsnas.engine.host.allocator import keep_freed_memory
from bsnas.engine.host.console import adopt_loggers, hide_libraries
from bsnas.engine.host.errors import MachineError, UserError, first_line, machine_failure
from bsnas.engine.host.precision import exact_float32
from bsnas.engine.host.preemption import requested, stop_here
from bsnas.kernels import choose_backend, set_backend

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Process:
    """One of `world_size` processes."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device, local_rank: int = 0) -> "Process":
        """This process among those that torch.distributed has joined; alone when it has joined none."""
        if not torch.distributed.is_initialized():
            return cls(rank=0, world_size=1, local_rank=local_rank, device=device)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return cls(rank=rank, world_size=world_size, local_rank=local_rank, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def per_rank(self, batch_size: int) -> int:
        """This rank's share of a global batch. Raises `UserError` when it does not divide evenly."""
        if batch_size % self.world_size:
            raise UserError(
                f"batch size {batch_size} does not divide over {self.world_size} processes; "
                f"take a multiple of {self.world_size}"
            )
        return batch_size // self.world_size


def start_process(timeout_minutes: float = 30, kernels: str | None = None) -> Process:
    """Join the processes that the `deepspeed` launcher started; alone when there is no launcher.

    A process that does not hear from another for `timeout_minutes` gives up. `kernels` forces their backend; None
    leaves BSNAS_KERNELS or the device's fastest. Raises `UserError` when the launcher's port is taken, or kernels, or
    CUDA graphs of BSNAS_CUDA_GRAPHS, cannot run on the device.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    hide_libraries()
    import deepspeed

    adopt_loggers()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Compiling this shared-memory operation takes 50 s, and only inference_all_reduce, never called here, uses it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = launcher.local_rank()
    launcher.local_size()  # raises for nonsense
    told: dict[str, int | str] = {
        "RANK": launcher.rank(),
        "WORLD_SIZE": launcher.world_size(),
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": launcher.master_address(),
        "MASTER_PORT": launcher.master_port() or _free_port(),
    }
    for name, value in told.items():
        os.environ.setdefault(name, str(value))
    if torch.cuda.is_available():
        device = _gpu(local_rank)
        torch.cuda.set_device(device)
        exact_float32()
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    _force_kernels(kernels, device)
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        if launcher.world_size() > 1:
            _meet(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"port {port} of this machine is in use, perhaps by another run; processes of a run need a port of "
                "their own: give the launcher another one with deepspeed --master_port PORT"
            ) from None
        raise MachineError(
            f"rank {launcher.rank()} cannot meet the others at {address}, port {port} ({first_line(error)}); give "
            "deepspeed --master_addr the host of rank 0 as all machines know it"
        ) from None
    # Gradients are reduced in a second group of all ranks, which DeepSpeed would make with torch's own 30 minutes.
    everyone = range(torch.distributed.get_world_size())
    deepspeed.utils.groups._WORLD_GROUP = torch.distributed.new_group(everyone, timeout=timeout)
    return Process.current(device, local_rank)


def _force_kernels(name: str | None, device: torch.device) -> None:
    try:
        set_backend(name)
        choose_backend(torch.empty(1, device=device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None


TELL_AFTER = 20.0
"""Seconds until it is told who is waited for, and between two tellings."""


def _meet(backend: str, timeout: timedelta) -> None:
    """Join the other processes, and say who is missing while that takes long.

    torch's own meeting, by environment, waits in silence. Raises MachineError when some do not come in time.
    """
    rank, size, port = launcher.rank(), launcher.world_size(), int(os.environ["MASTER_PORT"])
    address, host = os.environ["MASTER_ADDR"], socket.gethostname()
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    alone = threading.Timer(TELL_AFTER, _say, [f"rank {rank} on {host} waits for rank 0 at {address}, port {port}"])
    alone.daemon = True
    if rank:
        alone.start()
    store = torch.distributed.TCPStore(
        address, port, size, is_master=rank == 0 and not by_torchrun, timeout=timeout, wait_for_workers=False
    )
    alone.cancel()
    here = torch.distributed.PrefixStore(f"here/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    here.set(str(rank), host)
    if rank == 0:
        _await_all(here, size, timeout)
    torch.distributed.init_process_group(backend, store=here, rank=rank, world_size=size, timeout=timeout)


def _await_all(here: "torch.distributed.Store", size: int, timeout: timedelta) -> None:
    """Wait until every rank has set its host's name under its number."""
    began = told = time.monotonic()
    while missing := [rank for rank in range(size) if not here.check([str(rank)])]:
        now = time.monotonic()
        hosts = ", ".join(sorted({here.get(str(rank)).decode() for rank in range(size) if rank not in missing}))
        ranks = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        if now - began > timeout.total_seconds():
            raise MachineError(
                f"of {size} processes ranks {ranks} did not come within {timeout.total_seconds() / 60:g} minutes; "
                f"those that came are on {hosts}; see why the others do not start, then start again"
            )
        if now - told > TELL_AFTER:
            told = now
            _say(f"waiting for ranks {ranks} of {size} processes; those that are there are on {hosts}")
        time.sleep(0.05)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _gpu(local_rank: int) -> torch.device:
    if local_rank >= (seen := torch.cuda.device_count()):
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this process sees GPUs 0 to {seen - 1} only; start one process per GPU, "
            "as deepspeed does without --num_gpus"
        )
    return torch.device("cuda", local_rank)


def on_main(process: Process, action: Callable[[], Result]) -> Result:
    """Run `action` on the main process alone and give every rank its result, or its `UserError`."""
    outcome: list[Any] = [None, None]
    failure: UserError | None = None
    if process.is_main:
        try:
            outcome[0] = action()
        except UserError as error:
            failure = error
        except (OSError, MemoryError, sqlite3.Error) as error:
            failure = machine_failure(error)
            if failure is None:
                raise
        outcome[1] = failure and (type(failure), str(failure))
    if process.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        kind, message = outcome[1]
        told: UserError = kind(message)
        told.told = not process.is_main
        raise told
    return outcome[0]


@contextmanager
def entered_by_main(process: Process, context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter a context, as a lock, on the main process alone; every rank gets the `UserError` of entering it."""
    with ExitStack() as stack:
        on_main(process, lambda: stack.enter_context(context))
        yield


def smallest(process: Process, value: int) -> int:
    """The smallest of the ranks' values, so that all divide work in the same way."""
    if process.world_size == 1:
        return value
    tensor = torch.tensor(value, device=process.device)
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
    return int(tensor)


def stop_together(process: Process) -> None:
    """Raise `Preempted` on all ranks when any was told to stop: where nothing is lost and all of them come by."""
    stop_here(agreed=smallest(process, -int(requested())) < 0)


def gather_to_main(process: Process, tensor: torch.Tensor) -> torch.Tensor | None:
    """[ranks, *tensor.shape] on the main process, None on the others."""
    if process.world_size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(process.world_size)] if process.is_main else None
    torch.distributed.gather(tensor.contiguous(), parts, dst=0)
    return torch.stack(parts) if parts else None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def average_batchnorm(module: nn.Module) -> None:
    """Replace the running statistics of every rank by their mean over ranks.

    Each rank normalises with its own batches, so the statistics drift apart; nothing else keeps them equal.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    offset = 0
    for buffer in buffers:
        buffer.copy_(flat[offset : offset + buffer.numel()].view_as(buffer))
        offset += buffer.numel()
