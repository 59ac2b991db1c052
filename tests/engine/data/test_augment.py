"""Windows of random resized crops and shifts: torchvision's rules and distribution."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.loading.augment import DRAWS, draw_windows, resized_crop
from bsnas.engine.data.loading.order import sample_uniform

SIZES = {"landscape": (375, 500), "portrait": (500, 375), "square": (64, 64), "panorama": (100, 900), "tiny": (1, 1)}


def windows(size, count=4000, scale=(0.08, 1.0)):
    shapes = np.tile(np.array(size, np.int32), (count, 1))
    return resized_crop(shapes, sample_uniform(0, 0, np.arange(count), DRAWS), scale)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.9), (1.0, 1.0)])
def test_windows_lie_inside_the_image(size, scale):
    start, shape = windows(size, scale=scale)
    assert (start >= 0).all()
    assert (shape >= 1).all()
    assert (start + shape <= np.array(size)).all()


@pytest.mark.parametrize("size", [SIZES[name] for name in ("landscape", "square", "panorama")])
def test_distribution_is_torchvisions(size):
    """Means and quartiles of the window's place and size, over 4000 draws of each."""
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = np.concatenate(windows(size), 1)
    for column in range(4):  # top, left, height, width
        spread = max(theirs[:, column].std(), 1.0)
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.1 * spread  # 4.5 standard errors
        quartiles = [np.percentile(values[:, column], (25, 50, 75)) for values in (ours, theirs)]
        assert np.abs(quartiles[0] - quartiles[1]).max() < 0.2 * spread


def test_the_fallback_is_torchvisions_centre_window():
    """A whole-area window of a panorama never fits, so both fall back."""
    start, shape = windows(SIZES["panorama"], count=50, scale=(1.0, 1.0))
    image = torch.empty(3, *SIZES["panorama"])
    top, left, height, width = RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])
    assert (start == (top, left)).all()
    assert (shape == (height, width)).all()


def test_shifts_cover_the_padding_evenly():
    config = DataConfig(resolution=16, pad=2)
    start, shape, mirror = draw_windows(config, 0, 0, np.arange(5000), np.full((5000, 2), 16, np.int32))
    for axis in range(2):
        values, counts = np.unique(start[:, axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert np.abs(counts - 1000).max() < 130  # 4.5 standard deviations
    assert (shape == 16).all()
    assert not mirror.any()


def test_half_of_the_images_are_flipped():
    config = DataConfig(flip=True, augment="none")
    start, _, mirror = draw_windows(config, 0, 0, np.arange(5000), np.full((5000, 2), 16, np.int32))
    assert 2300 < mirror.sum() < 2700
    assert (start == 0).all()
