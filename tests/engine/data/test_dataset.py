"""Sources, listing and the search-validation split."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from bsnas.engine.data import builtin as sources
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.host.errors import UserError
from tests import ROOT
from tests.engine.data.cases import CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, folder_config, write_image_folder


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


def digits_config(cache, **changes):
    return DataConfig(cache_dir=str(cache), **changes)


def test_digits_hold_all_1797_images_once_with_their_labels(tmp_path):
    from sklearn.datasets import load_digits

    dataset = open_dataset(digits_config(tmp_path))
    test = dataset.open_test()
    assert (len(dataset.train), len(dataset.search_val), len(test)) == (1238, 200, 359)
    digits = load_digits()
    seen = []
    for files in (dataset.train, dataset.search_val, test):
        for path, label in zip(files.paths, files.labels, strict=True):
            image = np.asarray(Image.open(path)).astype(float) * 16 / 255
            nearest = np.abs(digits.images - image).sum((1, 2)).argmin()
            assert digits.target[nearest] == label
            assert np.abs(digits.images[nearest] - image).max() < 0.5, path
            seen.append(nearest)
    assert len(set(seen)) >= 1797 - 2  # JPEG rounding may merge near twins


def test_fashion_mnist_is_written_losslessly(tmp_path, monkeypatch):
    """The idx files' layout, on a package of twelve images per part in the format of the real one."""
    import gzip
    import struct

    rng = np.random.default_rng(0)
    package = tmp_path / "package"
    package.mkdir()
    pixels = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1], np.uint8)
    for prefix in ("train", "t10k"):
        images = struct.pack(">4B3I", 0, 0, 8, 3, 12, 28, 28) + pixels.tobytes()
        (package / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        names = struct.pack(">4BI", 0, 0, 8, 1, 12) + labels.tobytes()
        (package / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(names))
    monkeypatch.setattr(sources, "FASHION_PACKAGE", package)
    root = sources.prepare_source("fashion-mnist", None, tmp_path / "cache")
    for index, label in enumerate(labels):
        path = root / "train" / sources.FASHION_CLASSES[label] / f"{index:05}.png"
        assert np.array_equal(np.asarray(Image.open(path)), pixels[index])
    assert sorted(os.listdir(root)) == ["train", "val"]


def test_cifar_10_is_written_losslessly(tmp_path, monkeypatch):
    """From what torchvision gives of its download."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)

    class Downloaded:
        def __init__(self, root, train, download):
            assert download
            Path(root).mkdir(parents=True, exist_ok=True)
            self.data, self.targets = (pixels if train else pixels[:10]), [*range(10), 3, 1][: 12 if train else 10]
            self.classes = [f"class{n}" for n in range(10)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Downloaded)
    root = sources.prepare_source("cifar10", None, tmp_path / "cache")
    assert sorted(os.listdir(root)) == ["train", "val"]
    assert np.array_equal(np.asarray(Image.open(root / "train" / "3_class3" / "00010.png")), pixels[10])
    assert len(list((root / "val").rglob("*.png"))) == 10


def test_split_is_disjoint_balanced_and_recorded(folder, tmp_path):
    dataset = open_dataset(folder_config(folder, tmp_path / "cache"))
    train, held_out = set(dataset.train.names), set(dataset.search_val.names)
    assert not train & held_out
    assert len(train | held_out) == len(CLASSES) * TRAIN_PER_CLASS
    assert np.bincount(dataset.search_val.labels).tolist() == [2, 2, 2]
    for files in (dataset.train, dataset.search_val):
        assert [CLASSES[label] for label in files.labels] == [name.split("/")[0] for name in files.names]
    record = json.loads(dataset.split_file.read_text())
    assert record["classes"] == list(CLASSES)
    assert record["counts"] == [TRAIN_PER_CLASS] * 3
    assert record["seed"] == 0
    assert len(record["file_hash"]) == 64
    assert set(record["search_val"]) == held_out


def test_split_is_the_same_in_another_process_and_another_place(folder, tmp_path):
    here = open_dataset(folder_config(folder, tmp_path / "cache"))
    moved = shutil.copytree(folder, tmp_path / "moved")
    program = (
        "from tests.engine.data.cases import folder_config; import sys; "
        "from bsnas.engine.data.dataset import open_dataset; "
        "dataset = open_dataset(folder_config(sys.argv[1], sys.argv[2])); "
        "print(dataset.fingerprint, *dataset.search_val.names)"
    )
    command = [sys.executable, "-c", program, str(moved), str(tmp_path / "other")]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.split() == [here.fingerprint, *here.search_val.names]


def test_another_seed_gives_another_split(folder, tmp_path):
    first, second = (open_dataset(folder_config(folder, tmp_path / "c", split_seed=seed)) for seed in (0, 1))
    assert first.search_val.names != second.search_val.names
    assert first.fingerprint != second.fingerprint


def test_a_recorded_split_stays_when_the_choice_would_differ(folder, tmp_path):
    """The record decides, not the function that made it: older runs keep their split."""
    config = folder_config(folder, tmp_path / "cache")
    dataset = open_dataset(config)
    record = json.loads(dataset.split_file.read_text())
    swapped = [dataset.train.names[0], *record["search_val"][1:]]
    dataset.split_file.write_text(json.dumps(record | {"search_val": swapped}))
    assert set(open_dataset(config).search_val.names) == set(swapped)


def test_test_images_are_needed_before_anything_is_trained(folder, tmp_path):
    for name in CLASSES:
        shutil.rmtree(folder / "val" / name)
    (folder / "val" / "ant").mkdir()
    (folder / "val" / "ant" / "._00.jpg").touch()
    message = r"val holds no test images in class directories; sort them into val/CLASS/, or let engine/prepare.py"
    with pytest.raises(UserError, match=message):
        open_dataset(folder_config(folder, tmp_path / "cache"))
    for number in range(3):
        shutil.copy(next((folder / "train").glob("*/*")), folder / "val" / f"{number}.jpg")
    with pytest.raises(
        UserError, match=r"\(3 lie in it without a class, as ImageNet's archive unpacks them\); sort them"
    ):
        open_dataset(folder_config(folder, tmp_path / "cache"))


def test_test_files_are_read_only_on_request(folder, tmp_path):
    """val/ may hold junk as long as nobody asks for the test set."""
    for file in (folder / "val").glob("*/*"):
        file.write_bytes(b"junk")
    dataset = open_dataset(folder_config(folder, tmp_path / "cache"))
    with pytest.raises(UserError, match="cannot be used"):
        dataset.open_test()


def test_test_images_that_are_gone_at_the_end_are_told(folder, tmp_path):
    dataset = open_dataset(folder_config(folder, tmp_path / "cache"))
    for file in (folder / "val").glob("*/*"):
        file.unlink()
    with pytest.raises(UserError, match="images holds no test images; put some into val/CLASS/"):
        dataset.open_test()


def test_one_class_is_refused(folder, tmp_path):
    for part in ("train", "val"):
        for name in CLASSES[1:]:
            shutil.rmtree(folder / part / name)
    message = f"train holds one class, {CLASSES[0]}, and a classifier needs two; put the images into a directory per"
    with pytest.raises(UserError, match=message):
        open_dataset(folder_config(folder, tmp_path / "cache"))


def test_test_set_is_val(folder, tmp_path):
    test = open_dataset(folder_config(folder, tmp_path / "cache")).open_test()
    assert len(test) == len(CLASSES) * VAL_PER_CLASS
    assert all(Path(path).is_relative_to(folder / "val") for path in test.paths)


def test_many_processes_at_once_write_one_cache(tmp_path):
    program = (
        "import sys; from bsnas.engine.data.dataset import DataConfig, open_dataset; "
        "print(open_dataset(DataConfig(cache_dir=sys.argv[1])).fingerprint)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({process.communicate()[0] for process in running}) == 1
    assert [process.returncode for process in running] == [0, 0, 0]
    left = [name for name in os.listdir(tmp_path / "cache") if not name.endswith(".lock")]
    assert sorted(left) == ["checked", "digits", "splits"]


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, interrupted):
    def stop(*_):
        raise interrupted

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_write_images", stop)
        with pytest.raises(interrupted):
            sources.prepare_source("digits", None, tmp_path)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    assert sources.prepare_source("digits", None, tmp_path).is_dir()


def test_nested_files_and_upper_case_suffixes_are_found(folder, tmp_path):
    (folder / "train" / "ant" / "deep").mkdir()
    source = folder / "train" / "ant" / "00.jpg"
    shutil.copy(source, folder / "train" / "ant" / "deep" / "x.JPEG")
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / "ant" / ".hidden.jpg").write_text("not an image")
    dataset = open_dataset(folder_config(folder, tmp_path / "cache"))
    names = {*dataset.train.names, *dataset.search_val.names}
    assert len(names) == len(CLASSES) * TRAIN_PER_CLASS + 1
    assert "ant/deep/x.JPEG" in names
