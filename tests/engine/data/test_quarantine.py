"""Bad data: what cannot be used is set aside by name with the reason, counted, and too much of it refused."""

import io
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsnas.engine.data.checking.quarantine import read_quarantine
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.index import read_index
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.data.preparing.preparation import QUARANTINE
from bsnas.engine.data.preparing.stored_images import Resizing
from tests import ROOT
from tests.engine.data.cases import folder_config, write_image_folder
from tests.engine.data.source_cases import (
    add,
    error_of,
    example,
    prepare_source,
    write_csv,
    write_imagenet,
    write_parquet,
    write_webdataset,
)


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


run_prepare = partial(prepare_source, max_broken=0.5)


def encoded(kind, **options):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def bomb():
    """A PNG of a few bytes whose header names 3.6 thousand million pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")


BAD = {
    "empty.jpg": (b"", "is empty"),
    "text.jpg": (b"hello, this is no image", "is no image (it begins with b'hello, t')"),
    "header.jpg": (encoded("JPEG")[:100], "is no image (it begins with "),
    "cut.jpg": (encoded("JPEG")[:-300], "is damaged or cut off (JPEG, 40x30, "),
    "cut.png": (encoded("PNG")[:-900], "is damaged or cut off (PNG, 40x30, "),
    "moving.png": (encoded("GIF"), "is a GIF file, which the decoder does not read; convert it to JPEG or PNG"),
    "bomb.png": (bomb(), "has more pixels than are allowed (100 million)"),
}


def with_bad_files(folder):
    for name, (content, _) in BAD.items():
        (folder / "train" / "bee" / name).write_bytes(content)
    (folder / "train" / "bee" / "gone.jpg").symlink_to("nowhere.jpg")
    (folder / "train" / "bee" / "loop").symlink_to("..")
    return len(BAD) + 2


def assert_all_listed(entries, prefix):
    listed = dict(entries)
    for name, (_, reason) in BAD.items():
        assert listed[f"{prefix}bee/{name}"].startswith(reason)
    assert listed[f"{prefix}bee/gone.jpg"] == "cannot be read (No such file or directory)"
    loops = [name for name in listed if "loop" in name]
    assert loops == [f"{prefix}bee/loop"]
    assert listed[loops[0]] == "is a symbolic link to a directory around it"


def test_a_plain_folder_goes_on_without_its_bad_files(folder, tmp_path, capsys):
    clean = open_dataset(folder_config(folder, tmp_path / "clean"))
    bad = with_bad_files(folder)
    config = folder_config(folder, tmp_path / "cache", max_broken=0.3)
    dataset = open_dataset(config)
    assert dataset.train.names == clean.train.names
    assert dataset.fingerprint == clean.fingerprint
    (listed,) = (tmp_path / "cache" / "checked").glob("*-quarantine.tsv")
    entries = read_quarantine(listed)
    assert len(entries) == bad
    assert_all_listed(entries, "")
    told = capsys.readouterr().out
    assert f"{bad} of 42 images in {folder}/train cannot be used (21.43%): " in told
    assert f"and 6 more; they are set aside and listed in {listed}" in told
    assert len(list(TrainLoader(dataset.train, config, batch_size=9, seed=0).epoch(0))) == 3
    open_dataset(config)
    assert capsys.readouterr().out == ""  # told once


def test_too_many_bad_files_are_refused(folder, tmp_path):
    with_bad_files(folder)
    message = error_of(open_dataset, folder_config(folder, tmp_path / "cache"))
    assert message.startswith(f"9 of 42 images in {folder}/train cannot be used (21.43%): ")
    assert "; at most 1.00% may be (max_broken); all are listed in " in message
    assert message.endswith("-quarantine.tsv; mend or remove them, or raise max_broken")
    message = error_of(run_prepare, folder, tmp_path / "out", max_broken=0.1)
    assert message.startswith("9 of 54 images in the source cannot be used (16.67%): train/bee/")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_mended_file_is_taken_back(folder, tmp_path):
    config = folder_config(folder, tmp_path / "cache", max_broken=0.3)
    broken = folder / "train" / "ant" / "04.jpg"
    good = broken.read_bytes()
    broken.write_bytes(good[:-200])
    assert "ant/04.jpg" not in open_dataset(config).everything.names
    broken.write_bytes(good)
    (tmp_path / "split.json").unlink(missing_ok=True)
    assert "ant/04.jpg" in open_dataset(config, tmp_path / "split.json").everything.names


@pytest.mark.parametrize("resize", [False, True])
def test_prepare_lists_every_bad_file(folder, tmp_path, resize):
    bad = with_bad_files(folder)
    resizing = Resizing(shorter=16, quality=90, channels=3) if resize else None
    prepared = run_prepare(folder, tmp_path / "out", resizing=resizing)
    assert_all_listed(prepared.set_aside, "train/")
    assert read_quarantine(tmp_path / "out" / QUARANTINE) == sorted(prepared.set_aside)
    assert len(prepared.set_aside) == bad
    assert {part: len(files) for part, files in prepared.parts.items()} == {"train": 33, "val": 12}


def test_odd_but_usable_files_are_used(folder, tmp_path):
    """Wrong suffixes, gray, CMYK, 16 bits, palettes, turned by EXIF."""
    place = folder / "train" / "ant"
    turned = Image.Exif()
    turned[0x112] = 6
    (place / "turned.jpg").write_bytes(encoded("JPEG", exif=turned))
    (place / "really-png.jpg").write_bytes(encoded("PNG"))
    Image.open(io.BytesIO(encoded("PNG"))).convert("CMYK").save(place / "cmyk.jpg")
    Image.open(io.BytesIO(encoded("PNG"))).convert("L").save(place / "gray.jpg")
    Image.open(io.BytesIO(encoded("PNG"))).convert("P").save(place / "palette.png")
    Image.fromarray(np.full((30, 40), 30_000, np.uint16)).save(place / "deep.png")
    prepared = run_prepare(folder, tmp_path / "out", max_broken=0.0)
    files = prepared.parts["train"]
    shapes = {name: files.shapes[i].tolist() for i, name in enumerate(files.names)}
    assert shapes["ant/turned.jpg"] == [40, 30, 3]
    assert shapes["ant/cmyk.jpg"] == [30, 40, 4]
    assert shapes["ant/gray.jpg"] == shapes["ant/deep.png"] == [30, 40, 1]
    config = folder_config(tmp_path / "out", tmp_path / "cache")
    images = torch_images(open_dataset(config).everything, config)
    assert len(images) == 39


def torch_images(files, config):
    batches = [images for images, _ in TrainLoader(files, config, batch_size=8, seed=0).epoch(0)]
    return [image for batch in batches for image in batch]


def test_an_unreadable_directory_below_a_class(folder, tmp_path, monkeypatch):
    inner = folder / "train" / "bee" / "inner"
    inner.mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(inner):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    prepared = run_prepare(folder, tmp_path / "out")
    assert prepared.set_aside == [("train/bee/inner", "cannot be read (Permission denied)")]


def test_a_class_without_training_images(folder, tmp_path):
    for path in (folder / "train" / "cat").iterdir():
        path.unlink()
    prepared = run_prepare(folder, tmp_path / "out")
    assert prepared.classes == ("ant", "bee")
    assert prepared.set_aside[0] == ("val/cat/00.jpg", "is of class cat, which has no training image")
    assert len(prepared.set_aside) == 4


def test_bad_rows_of_a_csv_file(folder, tmp_path):
    source = write_csv(folder, tmp_path / "source")
    lines = source.read_text().splitlines()
    lines += [lines[1], lines[1].replace(",ant,", ",bee,"), "train/ant/01.jpg,7,train", "nowhere.jpg,ant,train"]
    lines += ["train/ant/02.jpg,ant,holiday", "train/ant/03.jpg"]
    source.write_text("\n".join(lines))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    prepared = run_prepare(source, tmp_path / "out", class_file=tmp_path / "classes.txt")
    reasons = dict(prepared.set_aside)
    assert sorted(prepared.set_aside) == prepared.set_aside
    assert reasons["line 47: train/ant/00.jpg"] == "is listed in line 2 already"
    assert reasons["line 48: train/ant/00.jpg"] == "is listed in line 2 already, with another label: ant"
    assert reasons["line 49: train/ant/01.jpg"] == "has label '7', which is none of the 3 classes"
    assert reasons["line 50: nowhere.jpg"] == "cannot be read (No such file or directory)"
    assert reasons["line 51: train/ant/02.jpg"] == "names the part 'holiday'; give train, val or test"
    assert reasons["line 52"] == "has 1 columns"
    assert len(prepared.parts["train"]) == 33


def test_members_of_an_archive_that_nobody_should_trust(folder, tmp_path):
    """Paths that lead out of the directory, links, devices: nothing of it is written anywhere."""
    source = write_webdataset(folder, tmp_path / "source")
    image = encoded("JPEG")
    with tarfile.open(source / "train-9999.tar", "w") as tar:
        for name, content in (("../../../escaped.jpg", image), ("../../../escaped.cls", b"ant")):
            add(tar, name, content)
        for name, content in (
            ("/absolute.jpg", image),
            ("/absolute.json", b'{"class": "ant", "name": "../../x.jpg"}'),
        ):
            add(tar, name, content)
        for kind, name in (
            (tarfile.SYMTYPE, "link.jpg"),
            (tarfile.LNKTYPE, "hard.jpg"),
            (tarfile.CHRTYPE, "device.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        add(tar, "alone.cls", b"ant")
        add(tar, "unlabelled.jpg", image)
    before = {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents}
    prepared = run_prepare(source, tmp_path / "out")
    assert {path for path in tmp_path.rglob("*") if tmp_path / "out" not in path.parents} == before | {tmp_path / "out"}
    reasons = dict(prepared.set_aside)
    assert reasons["train-9999.tar/link.jpg"] == "is a link to /etc/passwd in an archive"
    assert reasons["train-9999.tar/hard.jpg"] == "is a link to /etc/passwd in an archive"
    assert reasons["train-9999.tar/device.jpg"] == "is no regular file of its archive"
    assert reasons["train-9999.tar/alone"] == "has no image"
    assert reasons["train-9999.tar/unlabelled"] == "has no label: neither .cls nor .json nor a directory"
    names = prepared.parts["train"].names
    assert all(".." not in name.split("/") and not name.startswith("/") for name in names)
    for path in prepared.parts["train"].paths:
        assert Path(path).resolve().is_relative_to(tmp_path / "out" / "images")


def test_labels_out_of_range_in_parquet_and_tfrecord(folder, tmp_path):
    import pyarrow.parquet as pq

    source = write_parquet(folder, tmp_path / "parquet")
    file = source / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[3]["label"], rows[4]["image"] = -1, {"bytes": None, "path": "x.jpg"}
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), file)
    prepared = run_prepare(source, tmp_path / "a")
    assert prepared.set_aside == [
        ("train-00000-of-00001.parquet:3", "has label '-1', which is none of the 3 classes"),
        ("train-00000-of-00001.parquet:4", "holds no image bytes"),
    ]

    (tmp_path / "records").mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for part in ("train", "val"):
        with open(tmp_path / "records" / f"{part}.tfrecord", "wb") as handle:
            for number, label in enumerate((0, 0, 0, 1, 1, 1, 2)):
                record = example({"image": encoded("JPEG"), "label": label, "file_name": f"{number}.jpg".encode()})
                handle.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
            handle.write(struct.pack("<QI", 5, 0) + b"\xff\xff\xff\xff\xff" + b"\0\0\0\0")
    prepared = run_prepare(tmp_path / "records", tmp_path / "b", class_file=tmp_path / "classes.txt")
    reasons = dict(prepared.set_aside)
    assert reasons["train.tfrecord:6"] == "has label '2', which is none of the 2 classes"
    assert reasons["val.tfrecord:7"].startswith("is no tf.train.Example (")
    assert np.bincount(prepared.parts["train"].labels).tolist() == [3, 3]


def test_images_with_one_name_in_an_archive_are_told_apart(tmp_path):
    (tmp_path / "source").mkdir()
    for part in ("train", "val"):
        with open(tmp_path / "source" / f"{part}.tfrecord", "wb") as handle:
            for quality in (50, 60, 70, 80):
                content = encoded("JPEG", quality=quality)
                for label in (b"one", b"two"):
                    record = example({"image": content, "label": label, "file_name": b"same.jpg"})
                    handle.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
    prepared = run_prepare(tmp_path / "source", tmp_path / "out", max_broken=0.0)
    assert prepared.parts["train"].names == tuple(
        f"{label}/{name}" for label in ("one", "two") for name in ("same.jpg", "same~2.jpg", "same~3.jpg", "same~4.jpg")
    )
    assert len(set(prepared.parts["train"].digests.tolist())) == 4


# ---- sources that cannot be read at all


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "source {p} does not exist; give a directory, or a CSV file of path and label"),
        (lambda p: p.write_text("x"), "source {p} is a file that is no .csv; give a directory, or set --format of "),
        (lambda p: p.mkdir(), "{p} holds no class directories; it must be CLASS/IMAGE"),
        (
            lambda p: (p.mkdir(), (p / "train.parquet").write_bytes(b"PAR1 no")),
            "{p}/train.parquet cannot be read as Parquet: ",
        ),
        (
            lambda p: (p.mkdir(), (p / "train.tar").write_bytes(b"no tar" * 200)),
            "{p}/train.tar is no tar file or is cut off (",
        ),
        (
            lambda p: (p.mkdir(), (p / "train.tfrecord").write_bytes(b"x" * 50)),
            "{p}/train.tfrecord is no TFRecord file or is cut off at byte 0; bring it back",
        ),
        (
            lambda p: (p.mkdir(), (p / "ILSVRC2012_img_train.tar").write_bytes(b"")),
            "{p}/ILSVRC2012_img_val.tar is missing; ImageNet needs ",
        ),
        (
            lambda p: (p.mkdir(), (p / "list.csv").write_text("a.jpg,b\n")),
            "source {p} holds list.csv; give that file itself as the source",
        ),
    ],
)
def test_sources_that_are_none(tmp_path, make, message):
    place = tmp_path / "source"
    make(place)
    assert error_of(run_prepare, place, tmp_path / "out").startswith(message.format(p=place))


def test_csv_files_that_are_none(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("")
    assert error_of(run_prepare, file, tmp_path / "out") == f"{file} holds no rows; give a CSV file of path and label"
    file.write_text("a,b,c,d\n1,2,3,4\n")
    assert error_of(run_prepare, file, tmp_path / "out") == (
        f"{file} has the columns a, b, c, d; it needs a header with path and label, or rows of path and label alone"
    )


def test_options_that_do_not_fit(folder, tmp_path):
    (tmp_path / "names").write_text("a\na\n")
    assert error_of(run_prepare, folder, tmp_path / "o", class_file=tmp_path / "names") == (
        f"classes {tmp_path}/names goes with labels that are numbers, not with folder; leave it out"
    )
    source = write_csv(folder, tmp_path / "source")
    assert error_of(run_prepare, source, tmp_path / "o", class_file=tmp_path / "names") == (
        f"{tmp_path}/names must name each class once, one per line, in the order of the labels"
    )
    assert error_of(run_prepare, source, tmp_path / "o", val_labels=tmp_path / "names") == (
        f"val labels {tmp_path}/names go with ImageNet's archives only, not with csv; leave them out"
    )
    assert error_of(run_prepare, folder, tmp_path / "o", val_share=0.1) == (
        "the source has test images, so val share 0.1 has no meaning; leave it out"
    )
    assert error_of(run_prepare, folder / "train", tmp_path / "o") == (
        "the source names no test images (val/ or test/, or a column of parts); set a share of each class aside with "
        "--val-share 0.1"
    )
    assert error_of(Resizing, shorter=10, quality=101, channels=3).startswith("resize 10, quality 101, channels 3: ")


def test_nothing_of_the_users_is_overwritten_or_removed(folder, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "mine.jpg").write_bytes(b"mine")
    message = error_of(run_prepare, folder, tmp_path / "out")
    assert message == (
        f"output {tmp_path}/out holds images/, which engine/prepare.py did not write; choose an empty directory"
    )
    command = [sys.executable, str(ROOT / "engine/prepare.py"), "--source", str(folder)]
    ended = subprocess.run([*command, "--output", str(folder / "out")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) == (
        2,
        f"error: output {folder}/out lies in the source {folder}; choose another place",
    )
    assert not (folder / "out").exists()


def test_imagenet_without_labels(folder, tmp_path):
    write_imagenet(folder, tmp_path / "source")
    devkit = tmp_path / "source" / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(devkit.read_bytes()[:200])
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out").startswith(f"{devkit} cannot be read (")
    devkit.unlink()
    assert error_of(run_prepare, tmp_path / "source", tmp_path / "out") == (
        f"{tmp_path}/source holds neither ILSVRC2012_devkit_t12.tar.gz nor a list of validation labels; put one there, "
        "or give --val-labels FILE with lines of file name and synset"
    )


def test_the_script_ends_with_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "engine/prepare.py"), "--source", str(tmp_path / "no"), "--output", "o"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines() == [
        f"error: source {tmp_path}/no does not exist; give a directory, or a CSV file of path and label"
    ]


# ---- the index itself


def edited_index(output, **changes):
    import json

    file = output / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "its format is 2, not 1"),
        ({"classes": ["a", "a"]}, "its classes are not distinct names"),
        ({"classes": [1, 2]}, "its classes or its split are of another type"),
        ({"channels": "3"}, "its counts are no numbers"),
        ({"images": {"train": -1, "val": 1}}, "its counts are no numbers"),
        ({"hashes": None}, "TypeError"),
    ],
)
def test_an_index_from_somewhere_else(folder, tmp_path, changes, why):
    run_prepare(folder, tmp_path / "out")
    edited_index(tmp_path / "out", **changes)
    message = error_of(open_dataset, folder_config(tmp_path / "out", tmp_path / "cache"))
    assert message.startswith(f"index {tmp_path}/out/index.json cannot be used: {why}")
    assert message.endswith("; take one that engine/prepare.py wrote, or run it again")


def test_lines_of_an_index_that_were_changed(folder, tmp_path):
    import hashlib

    run_prepare(folder, tmp_path / "out")
    lines = tmp_path / "out" / "train.tsv"
    good = lines.read_bytes()
    config = folder_config(tmp_path / "out", tmp_path / "cache")
    lines.write_bytes(good.replace(b"ant", b"bee", 1))
    assert "cannot be used: it is not the one that index.json names" in error_of(open_dataset, config)
    bad = [b"../x", b"1\t2", b"\xff"]
    for junk in bad:
        fields = good.split(b"\n")[0].split(b"\t")
        fields[1] = junk
        content = b"\t".join(fields) + b"\n" + good.split(b"\n", 1)[1]
        lines.write_bytes(content)
        hashes = {"train": hashlib.sha256(content).hexdigest(), "val": read_index(tmp_path / "out").hashes["val"]}
        edited_index(tmp_path / "out", hashes=hashes)
        message = error_of(open_dataset, config)
        assert "line 1 cannot be read" in message or "cannot be read (No such file" in message


def test_an_image_that_changed_after_it_was_indexed(folder, tmp_path):
    run_prepare(folder, tmp_path / "out")
    config = folder_config(tmp_path / "out", tmp_path / "cache")
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"\0")
    message = error_of(open_dataset, config)
    assert message.startswith(f"{folder}/train/")
    assert message.endswith(" when it was indexed; run engine/prepare.py again")


def test_channels_of_index_and_training_must_agree(folder, tmp_path):
    run_prepare(folder, tmp_path / "out")
    config = folder_config(tmp_path / "out", tmp_path / "cache", channels=1, mean=(0.5,), std=(0.25,))
    assert error_of(open_dataset, config) == (
        f"{tmp_path}/out was prepared for 3 channels, the data have 1; prepare it with --channels 1, or set "
        "--data.channels 3"
    )
