"""Messages of engine/prepare.py and of the readers that the tests of bad data do not meet."""

import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.data.preparing.formats.archives import regular_members
from bsnas.engine.data.preparing.formats.tfrecord import parse_example
from bsnas.engine.host.errors import MachineError
from bsnas.engine.space.spaces import space_named
from tests import ROOT
from tests.engine.data.cases import folder_config, write_image_folder
from tests.engine.data.source_cases import add, error_of, example, write_imagenet
from tests.engine.data.source_cases import prepare_source as run_prepare
from tests.engine.data.test_quarantine import encoded


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("webdataset", "{p} holds no .tar shards; give the directory of WebDataset's shards"),
        ("tfrecord", "{p} holds no TFRecord files (*.tfrecord, *-00000-of-00010); give their directory"),
        ("parquet", "{p} holds no .parquet files; give the directory of the data set's files"),
        ("csv", "{p} cannot be read: "),
        (
            "imagenet",
            "{p}/ILSVRC2012_img_train.tar is missing; ImageNet needs ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
            "and ILSVRC2012_devkit_t12.tar.gz in one directory",
        ),
    ],
)
def test_a_format_that_is_not_there(tmp_path, kind, message):
    place = tmp_path / "source"
    place.mkdir()
    assert error_of(run_prepare, place, tmp_path / "out", kind=kind).startswith(message.format(p=place))


def test_parquet_without_images(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "train.parquet"
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), file)
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out") == (
        f"{file} has the columns text, label; it needs one of images (image, img, jpg, png) and one of labels (label, "
        "labels, class, cls, fine_label, target)"
    )


def test_records_without_image_or_label(tmp_path):
    import struct

    (tmp_path / "source").mkdir()
    for part in ("train", "val"):
        with open(tmp_path / "source" / f"{part}.tfrecord", "wb") as handle:
            for record in (
                *(
                    example({"image": encoded("JPEG"), "label": label, "filename": f"{i}".encode()})
                    for i in range(3)
                    for label in (b"a", b"b")
                ),
                example({"label": 3}),
                example({"image": encoded("JPEG"), "label": b" "}),
            ):
                handle.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
    prepared = run_prepare(tmp_path / "source", tmp_path / "out", max_broken=0.5)
    assert prepared.set_aside == [
        ("train.tfrecord:6", "has no image or no label among its fields label"),
        ("train.tfrecord:7", "has label '', which is no class"),
        ("val.tfrecord:6", "has no image or no label among its fields label"),
        ("val.tfrecord:7", "has label '', which is no class"),
    ]


def test_a_class_file_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "shards").mkdir()
    message = error_of(
        run_prepare, tmp_path / "shards", tmp_path / "out", kind="webdataset", class_file=tmp_path / "nowhere"
    )
    assert message.startswith(f"classes {tmp_path}/nowhere cannot be read: ")
    assert message.endswith("; give one class name per line")


def test_validation_labels_that_are_none(folder, tmp_path):
    write_imagenet(folder, tmp_path / "source", devkit=False)
    message = error_of(run_prepare, tmp_path / "source", tmp_path / "out", val_labels=tmp_path / "nowhere")
    assert message.startswith(f"{tmp_path}/nowhere cannot be read: ")
    (tmp_path / "words").write_text("hello\n")
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out", val_labels=tmp_path / "words") == (
        f"{tmp_path}/words names no synsets; give lines like ILSVRC2012_val_00000001.JPEG n01751748"
    )


def test_a_devkit_without_what_it_must_hold(folder, tmp_path):
    write_imagenet(folder, tmp_path / "source")
    devkit = tmp_path / "source" / "ILSVRC2012_devkit_t12.tar.gz"
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    message = error_of(run_prepare, tmp_path / "source", tmp_path / "out", val_labels=tmp_path / "binary")
    assert "; give lines of file name and synset" in message
    with tarfile.open(devkit) as tar:
        meta = tar.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()
    with tarfile.open(devkit, "w:gz") as tar:
        add(tar, "readme.txt", b"no more")
    message = error_of(run_prepare, tmp_path / "source", tmp_path / "out")
    assert message.endswith("; it must hold data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt")
    with tarfile.open(devkit, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta)
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out") == (
        f"{devkit} holds no data/ILSVRC2012_validation_ground_truth.txt; bring it back, or give --val-labels FILE"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\x7f", "a field is longer than its message"),
        (b"\x0b", "a field has the unknown type 3"),
        (b"\xff" * 11, "a number is too long"),
    ],
)
def test_messages_that_are_no_example(content, message):
    with pytest.raises(ValueError, match=message):
        parse_example(content)


def test_odd_members_of_imagenets_archives(folder, tmp_path):
    write_imagenet(folder, tmp_path / "source")
    with tarfile.open(tmp_path / "source" / "ILSVRC2012_img_train.tar", "a") as tar:
        add(tar, "readme.txt", b"hello")
    with tarfile.open(tmp_path / "source" / "ILSVRC2012_img_val.tar", "a") as tar:
        add(tar, "ILSVRC2012_val_00000999.JPEG", encoded("JPEG"))
    prepared = run_prepare(tmp_path / "source", tmp_path / "out", max_broken=0.5)
    assert prepared.set_aside == [
        ("ILSVRC2012_img_train.tar/readme.txt", "is not named nXXXXXXXX.tar, as the classes are"),
        ("ILSVRC2012_img_val.tar/ILSVRC2012_val_00000999.JPEG", "has no label in the ground truth"),
    ]


def test_members_that_are_too_large_or_missing(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "large.jpg", b"x" * 600)
    ((_, fault),) = regular_members(tmp_path / "a.tar", max_bytes=500)
    assert fault == "has 600 bytes, more than 500"
    assert error_of(list, regular_members(tmp_path / "no.tar")) == (
        f"{tmp_path}/no.tar cannot be read: No such file or directory; mend or remove it"
    )


def test_a_source_without_any_usable_image(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "source" / part / "a").mkdir(parents=True)
        (tmp_path / "source" / part / "a" / "x.jpg").write_bytes(b"")
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out", max_broken=1.0, val_share=0.5) == (
        "the source holds no training images; 2 were found in all"
    )


def test_a_directory_that_cannot_be_listed(folder, tmp_path, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(folder):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert error_of(run_prepare, folder, tmp_path / "out", kind="folder") == (
        f"cannot read {folder}: Permission denied; mend or remove it"
    )


# ---- shards that break after they were written


@pytest.fixture
def shards(folder, tmp_path):
    run_prepare(folder, tmp_path / "out", shard_bytes=10**9)
    config = folder_config(tmp_path / "out", tmp_path / "cache")
    files = open_dataset(config).train
    (shard,) = (tmp_path / "out" / "shards").glob("train-*.tar")
    return files, config, shard


def read_all(files, config):
    return [images.shape for images, _ in TrainLoader(files, config, batch_size=9, seed=0).epoch(0)]


def test_a_shard_that_is_cut_off(shards):
    files, config, shard = shards
    shard.write_bytes(shard.read_bytes()[:2000])
    assert error_of(read_all, files, config) == f"{shard} is cut off; bring it back, or run engine/prepare.py again"


def test_a_shard_that_is_gone(shards):
    from bsnas.engine.data import contents

    files, config, shard = shards
    shard.unlink()
    contents._opened.cache_clear()
    with pytest.raises(MachineError) as caught:
        read_all(files, config)
    assert str(caught.value) == f"{shard} cannot be read: No such file or directory; bring it back, then continue"


def test_an_image_in_a_shard_that_breaks_is_named(shards):
    files, config, shard = shards
    content = bytearray(shard.read_bytes())
    begin = int(files.offsets[3])
    content[begin : begin + int(files.sizes[3])] = bytes(int(files.sizes[3]))
    shard.write_bytes(content)
    assert error_of(read_all, files, config) == (
        f"image {files.names[3]} in {shard} is damaged or not an image; remove or replace it"
    )


def test_an_indexed_image_that_is_gone(folder, tmp_path):
    run_prepare(folder, tmp_path / "out")
    for path in (folder / "train").rglob("*.jpg"):
        path.unlink()
    message = error_of(open_dataset, folder_config(tmp_path / "out", tmp_path / "cache"))
    assert message.startswith(f"{folder}/train/")
    assert message.endswith(
        f" of the index in {tmp_path}/out cannot be read (No such file or directory); bring it back, or run "
        "engine/prepare.py again"
    )


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--val-per-class", "1.5"), "val per class is 1.5; give a whole number or a share between 0 and 1"),
        (("--val-share", "1"), "max broken 0.01, val share 1.0: give shares between 0 and 1"),
        (
            ("--threads", "-1"),
            "channels 3, max megapixels 100, threads -1, shards None: each must be at least 1 (threads 0 for all "
            "cores)",
        ),
        (
            ("--resize", "0"),
            "resize 0, quality 90, channels 3: need at least 1 pixel, a quality from 1 to 100, and 1 or 3",
        ),
    ],
)
def test_options(tmp_path, options, message):
    command = [sys.executable, str(ROOT / "engine/prepare.py"), "--source", ".", "--output", "o", *options]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert message in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_channels_of_data_and_space_must_agree():
    from bsnas.engine.config import RunConfig
    from bsnas.engine.data.dataset import DataConfig

    data = DataConfig(channels=1, mean=(0.5,), std=(0.5,))
    assert error_of(RunConfig, preset="x", space=space_named("digits"), data=data) == (
        "data channels 1 and input channels 3 of the space differ; set both to the same"
    )


def test_names_survive_any_character(tmp_path):
    """Tabs, newlines, backslashes and bytes that are no UTF-8, through the file of outcomes and the index."""
    source = write_image_folder(tmp_path / "images")
    plain = source / "train" / "ant" / "00.jpg"
    odd = ["tab\there.jpg", "line\nbreak.jpg", "back\\slash\\n.jpg", os.fsdecode(b"caf\xe9.jpg")]
    for name in odd:
        (source / "train" / "ant" / name).write_bytes(plain.read_bytes())
    for _ in range(2):  # the second time from the file
        config = folder_config(source, tmp_path / "cache")
        names = open_dataset(config).everything.names
        assert {f"ant/{name}" for name in odd} <= set(names)
        prepared = run_prepare(source, tmp_path / "out")
        files = open_dataset(folder_config(tmp_path / "out", tmp_path / "cache")).everything
        assert files.files == prepared.parts["train"].files
        assert {f"{source}/train/ant/{name}" for name in odd} <= set(files.files)
        assert np.array_equal(files.labels, prepared.parts["train"].labels)
