"""Which numbers a process computes with."""

from typing import Literal

import torch

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 on a GPU. fp32 on a CPU, where bf16 backward of depthwise convolutions is twice as slow."""
    return "bf16" if device.type == "cuda" else "fp32"


def exact_float32() -> None:
    """fp32 is fp32 in this process: training, scores, accuracies and latencies of that precision compare with a CPU's.

    Otherwise cuDNN's convolutions round their factors to the 10 bits of TF32 by torch's default, while matrix products
    do not. The switches are torch's older ones: torch.compile reads them, which the newer ones make an error.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
