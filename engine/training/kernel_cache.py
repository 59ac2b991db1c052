"""Triton's kernels, compiled at the start of a training by the processes of a machine together.

Triton compiles at first use, and processes that start at once all compile everything: 111 kernels at a second or two
each for imagenet's preset. Here each compiles its share into the cache on disk, from which all of them load.
"""

import os
from copy import deepcopy

import torch

from bsnas.engine.host import launcher
from bsnas.engine.host.distributed import Process
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.sampling import fair_round
from bsnas.kernels import choose_backend, graphs


def compile_kernels(supernet: Supernet, process: Process, images: int, dtype: torch.dtype) -> None:
    """Compile what steps of `images` images launch in dtype for every live operation; a barrier for all ranks.

    Nothing of the supernet changes. What another width of the input launches, or scoring does, compiles at first use.
    """
    example = torch.empty(1, device=process.device, dtype=dtype)
    if choose_backend(example) != "triton" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    from bsnas.kernels.tools.ahead_of_time import compile_share, recorded_launches

    twin = deepcopy(supernet).train()  # gradients, and what torch's own norms move, stay there
    with graphs.switched_off():
        launches = recorded_launches(lambda: _round_of_paths(twin, process.device, images, dtype))
    major, minor = torch.cuda.get_device_capability(process.device)
    local_size = launcher.local_size()
    compile_share(launches, 10 * major + minor, process.local_rank % local_size, local_size)
    if process.world_size > 1:
        torch.distributed.barrier()


def _round_of_paths(supernet: Supernet, device: torch.device, images: int, dtype: torch.dtype) -> None:
    """Forward and backward of paths that hold every live operation."""
    space = supernet.space
    x = torch.zeros(images, space.input_channels, space.resolution, space.resolution, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    for arch in fair_round(space, 0, 0):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = supernet(x, arch)
        logits.float().sum().backward()
        supernet.zero_grad()
