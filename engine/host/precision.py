"""Which numbers a process computes with."""

from typing import Literal

import torch

from bsnas.engine.host.distributed import Process

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(process: Process) -> Literal["bf16", "fp32"]:
    """bf16 on a GPU. fp32 on a CPU, where bf16 backward of depthwise convolutions is twice as slow."""
    return "bf16" if process.device.type == "cuda" else "fp32"
