"""Every message that bad data or a bad data configuration ends with."""

import json
import os
import shutil

import pytest

from bsnas.engine.data import builtin as sources
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.host.errors import UserError
from tests.engine.data.cases import folder_config, write_image_folder


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "folder"}, "source folder needs a path; give the directory that holds train/ and val/"),
        ({"path": "/x"}, "path /x goes with source folder only, not with digits; set the source to folder"),
        ({"resolution": 0}, "resolution is 0; it must be at least 1"),
        (
            {"val_per_class": 0},
            "val_per_class is 0; give a whole number of at least 1, or a share between 0 and 1",
        ),
        (
            {"val_per_class": 2.5},
            "val_per_class is 2.5; give a whole number of at least 1, or a share between 0 and 1",
        ),
        ({"channels": 0}, "channels is 0; it must be at least 1"),
        ({"max_broken": 1.5}, "max_broken is 1.5; it must be a share between 0 and 1"),
        ({"erase": -0.1}, "erase is -0.1; it must be a share between 0 and 1"),
        ({"mixup": -1.0}, "mixup is -1.0; it must be at least 0"),
        (
            {"rand_magnitude": 31},
            "rand_magnitude 31 and rand_operations 2: the strongest is 30, the most are 8",
        ),
        (
            {"channels": 1, "mean": (0.5,), "std": (0.25,), "policy": "rand"},
            "policy rand changes colours, which images of 1 channels lack; set policy none",
        ),
        ({"pad": -1}, "pad is -1; it must be at least 0"),
        ({"threads": -1}, "threads is -1; it must be at least 0"),
        ({"prefetch": -1}, "prefetch is -1; it must be at least 0"),
        ({"resize": 15}, "resize 15 is below resolution 16; make it at least as large"),
        (
            {"crop_scale": (0.5, 0.2)},
            "crop_scale is (0.5, 0.2); it must be two shares of the area with 0 < low <= high <= 1",
        ),
        ({"std": (1.0, 0.0, 1.0)}, "mean and std need one value or one per channel (3), and std must be positive"),
    ],
)
def test_configuration(settings, message):
    with pytest.raises(UserError) as caught:
        DataConfig(**settings)
    assert str(caught.value) == message


def open_error(folder, cache, **changes):
    with pytest.raises(UserError) as caught:
        open_dataset(folder_config(folder, cache, **changes))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_wrong_path(tmp_path, cache):
    assert open_error(tmp_path / "nowhere", cache) == (
        f"data path {tmp_path}/nowhere is not a directory; give one that holds train/CLASS/IMAGE and val/CLASS/IMAGE"
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_part(folder, cache, part):
    shutil.rmtree(folder / part)
    assert open_error(folder, cache) == (
        f"{folder} has no directory {part}/; a data set is train/CLASS/IMAGE and val/CLASS/IMAGE"
    )


def test_no_classes(folder, cache):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()
    assert open_error(folder, cache) == f"{folder}/train holds no class directories; it must be train/CLASS/IMAGE"


def test_class_only_in_val(folder, cache):
    shutil.rmtree(folder / "train" / "bee")
    assert open_error(folder, cache) == (
        f"class bee is in {folder}/val but not in train/ (1 such); add its training images or remove it from val/"
    )


def test_empty_class(folder, cache):
    shutil.rmtree(folder / "train" / "bee")
    (folder / "train" / "bee").mkdir()
    message = open_error(folder, cache)
    assert message.startswith(f"class bee has no images in {folder}/train/bee; add some (.bmp, ")
    assert message.endswith("or remove the class from train/ and val/")


def test_class_too_small_for_the_split(folder, cache):
    for index in range(9):
        os.remove(folder / "train" / "cat" / f"{index:02}.jpg")
    assert open_error(folder, cache) == (
        "class cat has 2 training images, but the search-validation split takes 2 per class and must "
        "leave some to train; add images or lower --data.val-per-class"
    )


def test_unreadable_directory(folder, cache, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("train/bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert open_error(folder, cache) == f"cannot read {folder}/train/bee: Permission denied; mend or remove it"


def test_changed_data_set(folder, cache):
    dataset = open_dataset(folder_config(folder, cache))
    shutil.copy(folder / "train" / "ant" / "00.jpg", folder / "train" / "ant" / "new.jpg")
    assert open_error(folder, cache) == (
        f"the number of images of {folder} is not that of the recorded split {dataset.split_file} "
        "(recorded 33 in 3 classes, now 34 in 3 classes); restore it, or start anew with another split file"
    )
    os.remove(folder / "train" / "ant" / "00.jpg")
    assert f"the list of files of {folder} is not that of the recorded split" in open_error(folder, cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_seed": 5}, "the split seed of {folder} is not that of the recorded split {file} (recorded 0, now 5)"),
        (
            {"val_per_class": 3},
            "the number of images per class of {folder} is not that of the recorded split {file} (recorded 2, now 3)",
        ),
    ],
)
def test_changed_split_settings_of_a_run(folder, cache, tmp_path, changes, message):
    file = tmp_path / "run" / "split.json"
    open_dataset(folder_config(folder, cache), split_file=file)
    before = file.read_bytes()
    with pytest.raises(UserError) as caught:
        open_dataset(folder_config(folder, cache, **changes), split_file=file)
    assert str(caught.value) == message.format(folder=folder, file=file) + (
        "; restore it, or start anew with another split file"
    )
    assert file.read_bytes() == before


def test_renamed_class(folder, cache):
    open_dataset(folder_config(folder, cache))
    for part in ("train", "val"):
        os.rename(folder / part / "ant", folder / part / "emu")
    assert f"the list of classes of {folder} is not that of" in open_error(folder, cache)


def test_damaged_split_file(folder, cache):
    file = open_dataset(folder_config(folder, cache)).split_file
    record = json.loads(file.read_text())
    file.write_text("{")
    assert open_error(folder, cache) == f"split file {file} cannot be read; delete it to make a new split"
    file.write_text(json.dumps(record | {"search_val": ["ant/none.jpg"]}))
    assert open_error(folder, cache) == (
        f"split {file} names ant/none.jpg, which {folder} does not hold; delete the split file"
    )


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = tmp_path / "file" / "cache"
    with pytest.raises(UserError) as caught:
        open_dataset(DataConfig(cache_dir=str(cache)))
    assert str(caught.value) == (
        f"cannot write {cache}/.digits.lock: Not a directory; set cache_dir to a directory that can be written"
    )
    images = write_image_folder(tmp_path / "images")
    assert open_error(images, cache).endswith("Not a directory; set cache_dir to a directory that can be written")


def test_fashion_mnist_neither_installed_nor_downloadable(cache, monkeypatch, tmp_path):
    import torchvision.datasets

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(sources, "FASHION_PACKAGE", tmp_path / "absent")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", refuse)
    with pytest.raises(UserError) as caught:
        sources.prepare_source("fashion-mnist", None, cache)
    assert str(caught.value) == (
        f"Fashion-MNIST is neither in {tmp_path}/absent nor could it be downloaded (no network); "
        "install Debian's package dataset-fashion-mnist or connect to the network"
    )


def test_cifar_10_that_cannot_be_downloaded(cache, monkeypatch):
    import torchvision.datasets

    def refuse(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(UserError) as caught:
        sources.prepare_source("cifar10", None, cache)
    assert str(caught.value) == (
        "CIFAR-10 could not be downloaded (no network); connect to the network, or give a directory of "
        "train/CLASS/IMAGE and val/CLASS/IMAGE with --data.source folder --data.path DIRECTORY"
    )


def test_damaged_fashion_mnist(cache, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "train-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    monkeypatch.setattr(sources, "FASHION_PACKAGE", package)
    with pytest.raises(UserError) as caught:
        sources.prepare_source("fashion-mnist", None, cache)
    message = str(caught.value)
    assert message.startswith(f"cannot read {package}/train-images-idx3-ubyte.gz: ")
    assert message.endswith("install Debian's package dataset-fashion-mnist again")


BROKEN = {
    "text": (lambda content: b"hello, this is no image", "is damaged or not an image"),
    "truncated header": (lambda content: content[:100], "is damaged or not an image"),
    "truncated pixels": (lambda content: content[: len(content) * 2 // 3], "is damaged or not an image"),
    "empty": (lambda content: b"", "is empty"),
    "vanished": (lambda content: None, "cannot be read (No such file or directory)"),
}


@pytest.mark.parametrize("augment", ["resized-crop", "none"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_training_image_is_named(folder, cache, kind, augment):
    config = folder_config(folder, cache, augment=augment, crop_scale=(1.0, 1.0))
    dataset = open_dataset(config)
    broken = dataset.train.path(4)
    break_file(broken, kind)
    with pytest.raises(UserError) as caught:
        list(TrainLoader(dataset.train, config, batch_size=5, seed=0, drop_last=False).epoch(0))
    assert str(caught.value) == f"image {broken} {BROKEN[kind][1]}; remove or replace it"


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_evaluation_image_is_named(folder, cache, kind):
    config = folder_config(folder, cache)
    files = open_dataset(config).open_test()
    break_file(files.path(7), kind)
    with pytest.raises(UserError) as caught:
        evaluation_set(files, config)
    assert str(caught.value) == f"image {files.path(7)} {BROKEN[kind][1]}; remove or replace it"
    assert [name for name in os.listdir(cache / "evaluation") if not name.endswith(".lock")] == []


def break_file(path, kind):
    with open(path, "rb") as handle:
        content = BROKEN[kind][0](handle.read())
    os.remove(path)
    if content is not None:
        with open(path, "wb") as handle:
            handle.write(content)


def test_batch_larger_than_the_data_set(folder, cache):
    config = folder_config(folder, cache)
    with pytest.raises(UserError) as caught:
        TrainLoader(open_dataset(config).train, config, batch_size=14, seed=0, world_size=2, drop_last=True)
    assert str(caught.value) == (
        "27 training images do not fill one batch of 28 over 2 processes; lower the batch size or add images"
    )


def test_no_room_for_the_decoded_images(folder, cache, monkeypatch):
    config = folder_config(folder, cache)
    files = open_dataset(config).search_val
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(UserError) as caught:
        evaluation_set(files, config)
    assert str(caught.value) == (
        f"decoding 6 images takes 0.0 GB in {cache}/evaluation, which has 0.0 GB free; free some or set cache_dir"
    )
