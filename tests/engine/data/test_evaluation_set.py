"""The decoded evaluation set: pixels as PIL makes them, kept once, replaced when files or transform change."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.loading import evaluation_set as module
from bsnas.engine.data.loading.evaluation_set import evaluation_set, normalize
from tests import ROOT
from tests.engine.data.cases import folder_config, write_image_folder


@pytest.fixture
def place(tmp_path):
    return write_image_folder(tmp_path / "images"), tmp_path / "cache"


def decoded(config):
    return evaluation_set(open_dataset(config).open_test(), config)


def pil_transform(path, resolution, resize):
    """torchvision's Resize and CenterCrop, or an exact resize."""
    image = Image.open(path).convert("RGB")
    if resize is None:
        return np.asarray(image.resize((resolution, resolution), Image.Resampling.BILINEAR))
    short, long = sorted(image.size)
    longer = int(resize * long / short)
    width, height = (resize, longer) if image.width <= image.height else (longer, resize)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - resolution) / 2), round((height - resolution) / 2)
    return np.asarray(image.crop((left, top, left + resolution, top + resolution)))


@pytest.mark.parametrize("resize", [None, 24, 29])
def test_pixels_are_those_of_pil(tmp_path, resize):
    sizes = ((61, 47), (47, 61), (24, 24), (20, 16), (90, 30))
    root = write_image_folder(tmp_path / "images", sizes)
    config = folder_config(root, tmp_path / "cache", resize=resize)
    files = open_dataset(config).train
    images = evaluation_set(files, config).images
    assert images.dtype == np.uint8
    for path, image in zip(files.paths, images, strict=True):
        difference = np.abs(image.astype(int) - pil_transform(path, 24, resize))
        assert difference.mean() < 1, path
        assert difference.max() < 9, path


def test_labels_follow_the_files(place):
    config = folder_config(*place)
    files = open_dataset(config).open_test()
    assert np.array_equal(decoded(config).labels, files.labels)


def test_a_second_call_and_another_process_reuse_the_file(place, monkeypatch):
    config = folder_config(*place)
    first = decoded(config)

    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module, "decode_images", refuse)
    second = decoded(config)
    assert np.array_equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    program = (
        "import sys; from bsnas.engine.data.loading import evaluation_set as module; "
        "from bsnas.engine.data.dataset import open_dataset; "
        "from tests.engine.data.cases import folder_config; "
        "module.decode_images = None; config = folder_config(*sys.argv[1:]); "
        "print(module.evaluation_set(open_dataset(config).open_test(), config).fingerprint)"
    )
    command = [sys.executable, "-c", program, *map(str, place)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.strip() == first.fingerprint


def test_a_replaced_file_is_decoded_anew(place):
    config = folder_config(*place)
    files = open_dataset(config).open_test()
    before = decoded(config)
    old = np.array(before.images)
    size = os.path.getsize(files.path(0))
    Image.new("RGB", (40, 40), (255, 0, 0)).save(files.path(0), quality=95)
    with open(files.path(0), "ab") as handle:
        handle.write(b"\0" * max(0, size - os.path.getsize(files.path(0))))
    time.sleep(0.01)
    os.utime(files.path(0))
    after = decoded(config)
    assert after.fingerprint != before.fingerprint
    assert np.abs(after.images[0].astype(int) - (255, 0, 0)).max() < 4
    assert np.array_equal(after.images[1:], old[1:])
    assert np.array_equal(before.images, old)  # a reader of the old one keeps it


@pytest.mark.parametrize("changes", [{"resolution": 20}, {"resize": 30}])
def test_another_transform_is_another_set(place, changes):
    first, second = decoded(folder_config(*place)), decoded(folder_config(*place, **changes))
    assert first.fingerprint != second.fingerprint
    assert not np.array_equal(first.images, second.images)


def test_normalisation_counts_in_the_fingerprint_but_shares_the_file(place):
    first, second = decoded(folder_config(*place)), decoded(folder_config(*place, mean=(0.4, 0.4, 0.4)))
    assert first.fingerprint != second.fingerprint
    assert first.images.filename == second.images.filename


def test_normalized_slices(place):
    data = decoded(folder_config(*place, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4)))
    expected = (data.images[2:7] / 255 - np.array(data.mean)) / np.array(data.std)
    part = data.normalized("cpu", torch.float32, 2, 7)
    assert part.shape == (5, 3, 24, 24)
    assert part.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(part.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5
    half = data.normalized("cpu", torch.float16)
    assert half.shape[0] == len(data) == 12
    assert half.dtype == torch.float16
    images = torch.from_numpy(np.array(data.images))
    assert torch.equal(normalize(images, data.mean, data.std, torch.float16), half)


def test_a_moved_data_set_shares_its_pixels(place, tmp_path):
    """Identity is names, labels and contents, wherever the files lie."""
    first = decoded(folder_config(*place))
    copy = shutil.copytree(place[0], tmp_path / "copy")
    second = decoded(folder_config(copy, place[1]))
    assert first.images.filename == second.images.filename
