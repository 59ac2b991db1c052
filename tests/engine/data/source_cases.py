"""One small set of images, written as every source format that engine/prepare.py reads."""

import csv
import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from bsnas.engine.data.preparing.formats.open_source import open_source
from bsnas.engine.data.preparing.preparation import Preparation, prepare
from bsnas.engine.host.errors import UserError
from tests.engine.data.cases import CLASSES

Image = tuple[str, str, str, bytes]
"""Part, class, file name, content."""


def images_of(folder: Path) -> Iterator[Image]:
    for path in sorted(folder.glob("*/*/*")):
        yield path.parts[-3], path.parts[-2], path.name, path.read_bytes()


def write_csv(folder: Path, target: Path) -> Path:
    """Images in directories that say nothing, and a list beside them."""
    target.mkdir()
    with open(target / "list.csv", "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["path", "label", "split"])
        for part, name, file, content in images_of(folder):
            place = target / part / name / file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            rows.writerow([f"{part}/{name}/{file}", name, "validation" if part == "val" else part])
    return target / "list.csv"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_webdataset(folder: Path, target: Path) -> Path:
    """Two shards per part, labels as numbers in .cls and names in .json."""
    target.mkdir()
    for part in ("train", "val"):
        images = [image for image in images_of(folder) if image[0] == part]
        for shard in range(2):
            with tarfile.open(target / f"{part}-{shard:04}.tar", "w") as tar:
                for _, name, file, content in images[shard::2]:
                    stem, _, suffix = file.partition(".")
                    add(tar, f"{name}/{stem}.{suffix}", content)
                    add(tar, f"{name}/{stem}.cls", str(CLASSES.index(name)).encode())
                    add(tar, f"{name}/{stem}.json", json.dumps({"class": name, "width": 1}).encode())
    return target


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(features: dict[str, bytes | int]) -> bytes:
    """A tf.train.Example, by the definition of its messages."""
    entries = b""
    for key, value in features.items():
        held = _field(1, _field(1, value)) if isinstance(value, bytes) else _field(3, _field(1, _varint(value)))
        entries += _field(1, _field(1, key.encode()) + _field(2, held))
    return _field(1, entries)


def write_tfrecord(folder: Path, target: Path) -> Path:
    """ImageNet's field names; one file per part. Checksums are zero: the reader does not look at them."""
    target.mkdir()
    for part, label in (("train", "train"), ("val", "validation")):
        with open(target / f"{label}-00000-of-00001", "wb") as handle:
            for _, name, file, content in [image for image in images_of(folder) if image[0] == part]:
                record = example(
                    {
                        "image/height": 300,
                        "image/encoded": content,
                        "image/filename": file.encode(),
                        "image/class/label": CLASSES.index(name) + 1,
                        "image/class/text": name.encode(),
                    }
                )
                handle.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
    return target


def write_parquet(folder: Path, target: Path) -> Path:
    """As `datasets` writes it: structs of bytes and path, numbers as labels, names in the schema's description."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (target / "data").mkdir(parents=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(CLASSES)}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for part, label in (("train", "train"), ("val", "validation")):
        images = [image for image in images_of(folder) if image[0] == part]
        table = pa.table(
            {
                "image": [{"bytes": content, "path": file} for _, _, file, content in images],
                "label": [CLASSES.index(name) for _, name, _, _ in images],
            }
        ).replace_schema_metadata(metadata)
        pq.write_table(table, target / "data" / f"{label}-00000-of-00001.parquet")
    return target


def write_test_folder(folder: Path, target: Path) -> Path:
    """An ImageFolder whose second part is called test/."""
    shutil.copytree(folder, target)
    (target / "val").rename(target / "test")
    return target


WRITERS: dict[str, Callable[[Path, Path], Path]] = {
    "csv": write_csv,
    "webdataset": write_webdataset,
    "tfrecord": write_tfrecord,
    "parquet": write_parquet,
    "test-folder": write_test_folder,
}

SYNSETS = ("n01440764", "n01443537", "n02084071")


def write_imagenet(folder: Path, target: Path, *, devkit: bool = True) -> dict[str, list[str]]:
    """The archives of ILSVRC2012 with the images of an ImageFolder; returns the names that the index should hold."""
    target.mkdir()
    synsets = dict(zip(CLASSES, SYNSETS, strict=True))
    names: dict[str, list[str]] = {"train": [], "val": []}
    with tarfile.open(target / "ILSVRC2012_img_train.tar", "w") as outer:
        for name in reversed(CLASSES):  # the archive is in no particular order
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number, (_, _, _, content) in enumerate(i for i in images_of(folder) if i[:2] == ("train", name)):
                    add(inner, f"{synsets[name]}_{number * 37 + 18}.JPEG", content)
                    names["train"].append(f"{synsets[name]}/{synsets[name]}_{number * 37 + 18}.JPEG")
            add(outer, f"{synsets[name]}.tar", buffer.getvalue())
    # ILSVRC2012_ID follows another order than the synsets' names
    ids = {name: number for number, name in enumerate(("cat", "ant", "bee"), 1)}
    truth = []
    with tarfile.open(target / "ILSVRC2012_img_val.tar", "w") as tar:
        images = [image for image in images_of(folder) if image[0] == "val"]
        for number, place in enumerate(np.random.default_rng(0).permutation(len(images)).tolist(), 1):
            _, name, _, content = images[place]
            add(tar, f"ILSVRC2012_val_{number:08}.JPEG", content)
            truth.append(ids[name])
            names["val"].append(f"{synsets[name]}/ILSVRC2012_val_{number:08}.JPEG")
    if devkit:
        _write_devkit(target / "ILSVRC2012_devkit_t12.tar.gz", {synsets[n]: i for n, i in ids.items()}, truth)
    else:
        wnids = {number: synsets[name] for name, number in ids.items()}
        lines = [f"ILSVRC2012_val_{number:08}.JPEG {wnids[label]}" for number, label in enumerate(truth, 1)]
        (target / "val_labels.txt").write_text("\n".join(lines))
    return {part: sorted(found) for part, found in names.items()}


def _write_devkit(file: Path, ids: dict[str, int], truth: list[int]) -> None:
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, synset, "an animal", "it lives", 0) for synset, number in ids.items()]
    rows.append((1001, "n00015388", "animal, creature", "inner node", 3))
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    with tarfile.open(file, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"ILSVRC2012 development kit")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", buffer.getvalue())
        text = "".join(f"{number}\n" for number in truth)
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", text.encode())


def prepare_source(
    source, output, *, kind="auto", class_file=None, val_labels=None, max_broken=0.0, threads=1, **changes
):
    """What engine/prepare.py does, with a small split; `changes` are further fields of `Preparation`."""
    settings = {"val_per_class": 2, "split_seed": 0, "max_megapixels": 100, **changes}
    reader = open_source(source, kind, class_file=class_file, val_labels=val_labels)
    return prepare(reader, Preparation(output=output, max_broken=max_broken, threads=threads, **settings))


def error_of(call, *arguments, **settings):
    """The message of the `UserError` that a call ends with: one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message
