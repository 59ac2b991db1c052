"""Triton's kernels, compiled at the start of a training by the processes of a machine together.

Triton compiles at first use, and processes that start at once all compile everything: 111 kernels at a second or two
each for imagenet's preset. Here each compiles its share into the cache on disk, in as many threads as there are
cores for it, and all of them load from there.
"""

import os
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from bsnas.engine.host import launcher
from bsnas.engine.host.distributed import Process
from bsnas.kernels import choose_backend, graphs


def compile_kernels(
    network: nn.Module, paths: Iterable[tuple[Any, ...]], shape: tuple[int, ...], process: Process, dtype: torch.dtype
) -> list[str]:
    """Compile what steps on images [N, C, H, W] of that shape launch in dtype; a barrier for all ranks.

    `paths` are the further arguments of forward passes that together hold every operation. Nothing of the network
    changes. What another width of the input launches, or scoring does, compiles at first use. Returns what failed.
    """
    example = torch.empty(1, device=process.device, dtype=dtype)
    if choose_backend(example) != "triton" or os.environ.get("TRITON_INTERPRET") == "1":
        return []
    from bsnas.kernels.tools.ahead_of_time import compile_share, recorded_launches

    with graphs.switched_off():
        launches = recorded_launches(lambda: _run_passes(network, paths, shape, process.device, dtype))
    major, minor = torch.cuda.get_device_capability(process.device)
    local_size = launcher.local_size()
    share = process.local_rank % local_size
    failed = compile_share(launches, 10 * major + minor, share, local_size, launcher.cores())
    if process.world_size > 1:
        torch.distributed.barrier()
    return failed


def _run_passes(
    network: nn.Module,
    paths: Iterable[tuple[Any, ...]],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Forward and backward of each path through a copy: gradients, and what torch's own norms move, stay there."""
    twin = deepcopy(network).train()
    x = torch.zeros(shape, device=device).contiguous(memory_format=torch.channels_last)
    for path in paths:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = twin(x, *path)
        logits.float().sum().backward()
        twin.zero_grad()
