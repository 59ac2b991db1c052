"""Batch normalisation of trained networks folded into the convolutions before it."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """A copy, in evaluation mode, whose convolutions include the batch normalisation that follows them.

    Works where both stand next to each other in an `nn.Sequential`, as in released networks and torchvision's. Folding
    happens in the network's own precision: fold first, then convert, so that only the final weights are rounded.
    """
    folded = copy.deepcopy(network).eval()
    for module in list(folded.modules()):
        if isinstance(module, nn.Sequential):
            _fold_neighbours(module)
    return folded


def _fold_neighbours(layers: nn.Sequential) -> None:
    for position in range(len(layers) - 1):
        conv, norm = layers[position], layers[position + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[position] = fuse_conv_bn_eval(conv, norm)
            layers[position + 1] = nn.Identity()
