"""Random crops and flips as numbers: where each sample of a batch is cut, computed from its own random numbers.

The pipeline only executes these windows, so the pixels that a sample contributes depend on (seed, epoch,
sample) and on nothing else: not on threads, not on the number of ranks, not on where a run was resumed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data import DataConfig
from engine.order import Indices, sample_uniform

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
SHIFT_DRAWS = 3  # row, column, flip
DRAWS = SHIFT_DRAWS + 2 * ATTEMPTS  # then area and aspect ratio per attempt

Int32 = npt.NDArray[np.int32]
Uniform = npt.NDArray[np.float64]


class Windows(NamedTuple):
    """One window per sample, in pixels."""

    start: Int32
    """First row and column, [N, 2]; negative where the window reaches into the padding."""
    shape: Int32
    """Height and width, [N, 2]."""
    mirror: Int32
    """1 where the sample is flipped left to right, [N]."""


def draw_windows(config: DataConfig, seed: int, epoch: int, indices: Indices, image_shapes: Int32) -> Windows:
    """Windows of the samples at `indices`; `image_shapes` is [N, 2], height and width."""
    crops = config.augment == "resized-crop"
    uniform = sample_uniform(seed, epoch, indices, DRAWS if crops else SHIFT_DRAWS)
    mirror = (uniform[:, 2] < 0.5 if config.flip else np.zeros(len(indices))).astype(np.int32)
    if crops:
        start, shape = resized_crop(image_shapes, uniform, config.crop_scale)
    else:
        pad = config.pad if config.augment == "pad-crop" else 0
        start = np.floor(uniform[:, :2] * (2 * pad + 1)).astype(np.int32) - pad
        shape = np.full_like(start, config.resolution)
    return Windows(start, shape, mirror)


def resized_crop(image_shapes: Int32, uniform: Uniform, scale: tuple[float, float]) -> tuple[Int32, Int32]:
    """torchvision's RandomResizedCrop for a batch: start and shape, [N, 2] each.

    The first of ten draws of area share and log-uniform aspect ratio that fits into the image is taken; if
    none fits, the largest centred window of an allowed aspect ratio.
    """
    height, width = image_shapes[:, :1].astype(np.float64), image_shapes[:, 1:].astype(np.float64)
    area = height * width * (scale[0] + uniform[:, SHIFT_DRAWS::2] * (scale[1] - scale[0]))
    low, high = np.log(RATIO)
    ratio = np.exp(low + uniform[:, SHIFT_DRAWS + 1 :: 2] * (high - low))
    shapes = np.stack([np.round(np.sqrt(area / ratio)), np.round(np.sqrt(area * ratio))], -1)  # [N, attempts, 2]
    fits = np.all((shapes > 0) & (shapes <= image_shapes[:, None]), axis=-1)
    shape = shapes[np.arange(len(shapes)), fits.argmax(1)]
    start = np.floor(uniform[:, :2] * (image_shapes - shape + 1))

    fallback = np.concatenate(
        [np.minimum(height, np.round(width / RATIO[0])), np.minimum(width, np.round(height * RATIO[1]))], 1
    )
    missed = ~np.any(fits, axis=1)
    shape[missed] = fallback[missed]
    start[missed] = (image_shapes[missed] - shape[missed]) // 2
    return start.astype(np.int32), shape.astype(np.int32)
