"""What fp32 means on a GPU."""

import torch


def exact_float32() -> None:
    """fp32 is fp32 in this process: training, scores, accuracies and latencies of that precision compare with a CPU's.

    Otherwise cuDNN's convolutions round their factors to the 10 bits of TF32 by torch's default, while matrix products
    do not. The switches are torch's older ones: torch.compile reads them, which the newer ones make an error.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
