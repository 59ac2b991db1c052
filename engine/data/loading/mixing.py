"""Mixup and CutMix: pairs of images of one batch become one, and so do their labels.

A batch is mixed with itself in reverse. The share and the window depend on (seed, epoch, step) and are the same on all
ranks; the partners come from the rank's own part of the batch, so these two, alone among augmentations, depend on the
number of ranks.
"""

import numpy as np
import torch
from torch import Tensor

from bsnas.engine.data.dataset import DataConfig

MIXING_STREAM = 0x6D6978
"""Keeps these random numbers apart from those of the epochs' orders."""


class Mixing:
    """Mixes batches of one configuration and seed; without mixup and CutMix they pass unchanged."""

    def __init__(self, config: DataConfig, seed: int, *, classes: int) -> None:
        self._mixup, self._cutmix, self._seed, self._classes = config.mixup, config.cutmix, seed, classes

    def mix(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] and labels int64 [N] to mixed images and probabilities fp32 [N, classes]."""
        if not self._mixup and not self._cutmix:
            return images, labels
        rng = np.random.Generator(
            np.random.Philox(key=[self._seed & (2**64 - 1), MIXING_STREAM], counter=[0, 0, epoch, step])
        )
        cut = bool(self._cutmix) and (not self._mixup or rng.random() < 0.5)
        alpha = self._cutmix if cut else self._mixup
        share = float(rng.beta(alpha, alpha))
        if cut:
            images, share = _paste(images, share, rng.random(2).tolist())
        else:
            images = torch.lerp(images.flip(0), images, share)
        targets = torch.nn.functional.one_hot(labels, self._classes).float()
        return images, torch.lerp(targets.flip(0), targets, share)


def _paste(images: Tensor, share: float, centre: list[float]) -> tuple[Tensor, float]:
    """Put a window of the partner into each image; returns the share that is left of it, by the window as clipped."""
    height, width = images.shape[2:]
    side = (1 - share) ** 0.5 / 2
    rows = [min(max(round((centre[0] + sign * side) * height), 0), height) for sign in (-1, 1)]
    columns = [min(max(round((centre[1] + sign * side) * width), 0), width) for sign in (-1, 1)]
    window = (slice(None), slice(None), slice(*rows), slice(*columns))
    mixed = images.clone(memory_format=torch.preserve_format)
    mixed[window] = images.flip(0)[window]
    return mixed, 1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / (height * width)
