"""Augmentation as numbers: where each sample of a batch is cut, what it goes through, what is erased of it.

All are computed from the sample's own random numbers. The pipeline only executes them, so the pixels that a sample
contributes depend on (seed, epoch, sample) and on nothing else: not on threads, not on the number of ranks, not on
where a run was resumed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.loading.order import Indices, sample_uniform
from bsnas.engine.data.loading.policies import policy_plan

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10
SHIFT_DRAWS = 3  # row, column, flip
DRAWS = SHIFT_DRAWS + 2 * ATTEMPTS  # then area and aspect ratio per attempt
ERASE_AREA = (0.02, 1 / 3)  # share of the image, as in the paper (arXiv 1708.04896) and in torchvision
ERASE_RATIO = (0.3, 3.3)
ERASE_DRAWS = 3 + 2 * ATTEMPTS  # row, column, whether at all; then area and aspect ratio per attempt
# First random number of a sample for each purpose, so that one that is switched on leaves the others as they are.
ERASE_FROM, CPU_FROM, POLICY_FROM = 64, 96, 128

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
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


class Augmentation:
    """Everything random that happens to the samples of a data set, for one configuration and seed."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config = config
        self.policy = policy_plan(config)
        """AutoAugment and its relatives; None without."""
        self._seed = seed

    def inputs(self, *, on_gpu: bool) -> tuple[str, ...]:
        """Names of what `draw` gives."""
        config = self.config
        names = ["mirror", *(["start", "shape"] if config.augment != "none" else [])]
        names += ["matrix"] if self._warps(on_gpu) else []
        names += ["operation", "bin", "sign"] if self.policy is not None else []
        names += ["erase_start", "erase_shape"] if config.erase else []
        return (*names, *(["on_cpu"] if on_gpu and config.cpu_decode_share else []))

    def _warps(self, on_gpu: bool) -> bool:
        return self.config.augment == "resized-crop" and not self.config.antialias and not on_gpu

    def draw(self, epoch: int, indices: Indices, image_shapes: Int32, *, on_gpu: bool) -> dict[str, Int32 | Float32]:
        """An array per input, [N], [N, n] or [N, 3, 3], for the samples at `indices`, of height and width [N, 2]."""
        config, seed = self.config, self._seed
        windows = draw_windows(config, seed, epoch, indices, image_shapes)
        drawn: dict[str, Int32 | Float32] = windows._asdict()
        if self._warps(on_gpu):
            drawn["matrix"] = resize_matrix(windows.shape, config.resolution)
        if self.policy is not None:
            uniform = sample_uniform(seed, epoch, indices, self.policy.draws, first=POLICY_FROM)
            drawn |= self.policy.choose(uniform)._asdict()
        if config.erase:
            uniform = sample_uniform(seed, epoch, indices, ERASE_DRAWS, first=ERASE_FROM)
            drawn["erase_start"], drawn["erase_shape"] = erased(config.resolution, uniform, config.erase)
        drawn["on_cpu"] = (
            sample_uniform(seed, epoch, indices, 1, first=CPU_FROM)[:, 0] < config.cpu_decode_share
        ).astype(np.int32)
        return {name: drawn[name] for name in self.inputs(on_gpu=on_gpu)}


def resize_matrix(shape: Int32, side: int) -> Float32:
    """Maps of pixels of a square of `side` to those of windows whose height and width are [N, 2]: [N, 3, 3]."""
    matrix = np.zeros((len(shape), 3, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 1, 1], matrix[:, 2, 2] = shape[:, 1] / side, shape[:, 0] / side, 1
    return matrix


def erased(side: int, uniform: Uniform, probability: float) -> tuple[Float32, Float32]:
    """Random erasing: start and shape of a rectangle inside each image of `side` pixels, [N, 2]; empty where none.

    The first of ten draws of area and log-uniform aspect ratio that fits is taken, as torchvision does; if none fits,
    nothing is erased.
    """
    low, high = ERASE_AREA
    area = side * side * (low + uniform[:, SHIFT_DRAWS::2] * (high - low))
    low, high = np.log(ERASE_RATIO)
    ratio = np.exp(low + uniform[:, SHIFT_DRAWS + 1 :: 2] * (high - low))
    shapes = np.stack([np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))], -1)  # [N, attempts, 2]
    fits = np.all((shapes > 0) & (shapes < side), axis=-1)
    shape = shapes[np.arange(len(shapes)), fits.argmax(1)]
    shape[~fits.any(1) | (uniform[:, 2] >= probability)] = 0
    start = np.floor(uniform[:, :2] * (side - shape + 1))
    return start.astype(np.float32), shape.astype(np.float32)


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
