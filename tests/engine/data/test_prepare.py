"""engine/prepare.py: every source format gives the same index; it survives being killed; the loader reads it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsnas.engine.data.contents import read_ranges
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.index import read_index
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.data.preparing.preparation import summary
from bsnas.engine.data.preparing.stored_images import Resizing
from tests import ROOT
from tests.engine.data.cases import CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, folder_config, write_image_folder
from tests.engine.data.source_cases import SYNSETS, WRITERS, images_of, prepare_source, write_imagenet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("source") / "images")


run_prepare = partial(prepare_source, threads=2)


def content_of(output):
    """What must be equal for equal images, whatever they came from."""
    record = json.loads((output / "index.json").read_text())
    index = read_index(output)
    parts = {part: index.part(part) for part in ("train", "val")}
    rows = {
        part: list(
            zip(f.names, f.labels.tolist(), f.sizes.tolist(), f.shapes.tolist(), f.digests.tolist(), strict=True)
        )
        for part, f in parts.items()
    }
    split = json.loads((output / index.split["file"]).read_text())["search_val"]
    return record["fingerprint"], record["classes"], rows, split


def test_an_image_folder_is_indexed_in_place(folder, tmp_path):
    prepared = run_prepare(folder, tmp_path / "out")
    _, classes, rows, split = content_of(tmp_path / "out")
    assert classes == list(CLASSES)
    assert len(rows["train"]) == 3 * TRAIN_PER_CLASS
    assert len(rows["val"]) == 3 * VAL_PER_CLASS
    assert len(split) == 6
    for part, name, file, content in images_of(folder):
        row = next(row for row in rows[part] if row[0] == f"{name}/{file}")
        width, height = Image.open(folder / part / name / file).size
        assert row[1:4] == (CLASSES.index(name), len(content), [height, width, 3])
    assert not (tmp_path / "out" / "images").exists()
    assert prepared.parts["train"].path(0) == str(folder / "train" / "ant" / "00.jpg")


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_index(folder, tmp_path, kind):
    run_prepare(folder, tmp_path / "expected")
    run_prepare(WRITERS[kind](folder, tmp_path / "source"), tmp_path / "out")
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


@pytest.mark.parametrize("shards", [None, 20_000])
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_formats_agree_on_resized_copies_and_shards(folder, tmp_path, kind, shards):
    resizing = Resizing(shorter=24, quality=80, channels=3)
    run_prepare(folder, tmp_path / "expected", resizing=resizing)
    run_prepare(WRITERS[kind](folder, tmp_path / "source"), tmp_path / "out", resizing=resizing, shard_bytes=shards)
    assert content_of(tmp_path / "out") == content_of(tmp_path / "expected")


def test_the_plain_folder_and_the_prepared_one_train_alike(folder, tmp_path):
    """Same split, same fingerprint, same batches: from the files, from the index, and from shards."""
    run_prepare(folder, tmp_path / "in-place")
    run_prepare(folder, tmp_path / "shards", shard_bytes=20_000)
    seen = []
    for path in (folder, tmp_path / "in-place", tmp_path / "shards"):
        config = folder_config(path, tmp_path / "cache")
        dataset = open_dataset(config)
        loader = TrainLoader(dataset.train, config, batch_size=9, seed=3)
        batches = [images.numpy().tobytes() + labels.numpy().tobytes() for images, labels in loader.epoch(0)]
        test = evaluation_set(dataset.open_test(), config)
        seen.append((dataset.fingerprint, dataset.search_val.names, batches, test.images.tobytes(), test.fingerprint))
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("devkit", [True, False])
def test_the_original_imagenet_layout(folder, tmp_path, devkit):
    names = write_imagenet(folder, tmp_path / "source", devkit=devkit)
    run_prepare(tmp_path / "source", tmp_path / "out")
    _, classes, rows, _ = content_of(tmp_path / "out")
    assert classes == list(SYNSETS)
    contents = {part: {} for part in ("train", "val")}
    for part, name, _, content in images_of(folder):
        contents[part].setdefault(SYNSETS[CLASSES.index(name)], set()).add(content)
    for part in ("train", "val"):
        assert [row[0] for row in rows[part]] == names[part]
        for name, label, *_ in rows[part]:
            synset = name.split("/")[0]
            assert SYNSETS[label] == synset
            assert (tmp_path / "out" / "images" / part / name).read_bytes() in contents[part][synset]


def test_resized_copies(tmp_path):
    source = write_image_folder(tmp_path / "images", sizes=((600, 450), (40, 30)))
    prepared = run_prepare(source, tmp_path / "out", resizing=Resizing(shorter=64, quality=85, channels=3))
    files = prepared.parts["train"]
    for place, name in enumerate(files.names):
        original, copy = Image.open(source / "train" / name), Image.open(files.path(place))
        if min(original.size) <= 64:
            assert (source / "train" / name).read_bytes() == Path(files.path(place)).read_bytes()
            continue
        assert copy.size == (85, 64)
        assert files.shapes[place].tolist() == [64, 85, 3]
        expected = np.asarray(original.resize((85, 64), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(np.asarray(copy).astype(int) - expected).mean() < 2.5


def test_gray_copies_of_any_kind_of_image(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            place = tmp_path / "images" / part / name
            place.mkdir(parents=True)
            deep = np.linspace(0, 65535, 50 * 40).reshape(40, 50).astype(np.uint16)
            Image.fromarray(deep).save(place / "deep.png")
            colour = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8))
            colour.convert("RGBA").save(place / "alpha.png")
            colour.convert("CMYK").save(place / "cmyk.jpg")
            colour.save(place / "named.jpg", "PNG")
    resizing = Resizing(shorter=20, quality=95, channels=1)
    prepared = run_prepare(tmp_path / "images", tmp_path / "out", resizing=resizing, channels=1, val_per_class=1)
    files = prepared.parts["train"]
    assert files.shapes.tolist() == [[20, 25, 1]] * 8
    assert prepared.kinds == {"JPEG": 16}
    deep = np.asarray(Image.open(files.path(files.names.index("a/deep.png")))).astype(int)
    assert deep[0].max() < 20
    assert deep[-1].min() > 235


def test_shards_are_readable_by_dali_and_by_us(folder, tmp_path):
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    prepared = run_prepare(folder, tmp_path / "out", shard_bytes=15_000)
    files = prepared.parts["train"]
    shards = sorted((tmp_path / "out" / "shards").glob("train-*.tar"))
    assert len(shards) > 1
    assert not (tmp_path / "out" / "images").exists()
    expected = sorted(
        (content, str(CLASSES.index(name))) for part, name, _, content in images_of(folder) if part == "train"
    )
    read = [bytes(content) for content in read_ranges(files, range(len(files)))]
    assert sorted(zip(read, map(str, files.labels.tolist()), strict=True)) == expected
    pipeline = Pipeline(1, 1, None)
    with pipeline:
        paths = [str(path) for path in shards]
        indices = [str(path.with_suffix(".idx")) for path in shards]
        pipeline.set_outputs(*fn.readers.webdataset(paths=paths, index_paths=indices, ext=["jpg", "cls"], name="r"))
    assert pipeline.reader_meta("r")["epoch_size"] == len(files)
    outputs = [[bytes(np.array(part.at(0))) for part in pipeline.run()] for _ in range(len(files))]
    assert sorted((content, label.decode()) for content, label in outputs) == expected


def test_shards_can_be_a_source_again(folder, tmp_path):
    run_prepare(folder, tmp_path / "first", shard_bytes=20_000)
    run_prepare(tmp_path / "first" / "shards", tmp_path / "second")
    assert content_of(tmp_path / "second") == content_of(tmp_path / "first")


def test_a_source_without_test_images(folder, tmp_path):
    prepared = run_prepare(folder / "train", tmp_path / "out", val_share=0.2)
    assert np.bincount(prepared.parts["val"].labels).tolist() == [3, 3, 3]  # a fifth of 11, rounded up
    assert np.bincount(prepared.parts["train"].labels).tolist() == [8, 8, 8]
    again = run_prepare(folder / "train", tmp_path / "again", val_share=0.2)
    assert again.parts["val"].names == prepared.parts["val"].names


def test_a_share_per_class_for_the_split(folder, tmp_path):
    prepared = run_prepare(folder, tmp_path / "out", val_per_class=0.25)
    labels = prepared.parts["train"].labels[prepared.search_val]
    assert np.bincount(labels).tolist() == [3, 3, 3]
    config = folder_config(tmp_path / "out", tmp_path / "cache", val_per_class=0.25)
    assert len(open_dataset(config).search_val) == 9


def test_summary(tmp_path):
    source = write_image_folder(tmp_path / "images")
    for index in range(6):
        os.remove(source / "train" / "cat" / f"{index:02}.jpg")
    (source / "val" / "bee" / "copy.jpg").write_bytes((source / "train" / "ant" / "00.jpg").read_bytes())
    for path in (source / "val" / "cat").iterdir():
        path.unlink()
    figures = summary(run_prepare(source, tmp_path / "out"))
    assert figures["images"] == {"train": 27, "val": 9}
    assert figures["images_per_class"] == {"min": 5, "median": 11.0, "max": 11}
    assert figures["imbalance"] == pytest.approx(2.2)
    assert next(iter(figures["rarest_classes"])) == "cat"
    assert figures["classes_without_test_images"] == ["cat"]
    assert figures["test_images_also_in_train"] == 1


# ---- interrupted and repeated


def command(source, output, *options):
    settings = ["--val-per-class", "2", "--threads", "1", *options]
    return [
        sys.executable,
        str(ROOT / "engine/prepare.py"),
        "--source",
        str(source),
        "--output",
        str(output),
        *settings,
    ]


@pytest.mark.slow
def test_killed_at_random_it_ends_with_the_same_index(folder, tmp_path, monkeypatch):
    """SIGKILL at random moments until it gets through."""
    source = WRITERS["webdataset"](
        write_image_folder(tmp_path / "many", sizes=((700, 500), (500, 700))), tmp_path / "s"
    )
    options = ("--resize", "32", "--shards", "1")
    subprocess.run(command(source, tmp_path / "undisturbed", *options), check=True, capture_output=True)
    rng, kills = random.Random(0), 0
    for _ in range(12):
        process = subprocess.Popen(command(source, tmp_path / "out", *options), stdout=subprocess.DEVNULL)
        began = time.monotonic()
        # From the first written file on, which is where something can be half done.
        while process.poll() is None and time.monotonic() - began < 60 and not (tmp_path / "out/.prepare").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.01 if kills < 3 else 60))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.wait() == 0
    assert kills >= 3
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")
    images = {path.name for path in (tmp_path / "out").rglob("*.tmp")}
    assert images == set()


def test_a_second_call_checks_nothing_again(folder, tmp_path, monkeypatch):
    run_prepare(folder, tmp_path / "out")
    before = content_of(tmp_path / "out")
    monkeypatch.setattr("bsnas.engine.data.checking.image_check.ImageChecker._describe", None)  # whoever calls it fails
    run_prepare(folder, tmp_path / "out")
    assert content_of(tmp_path / "out") == before


def test_a_torn_file_of_outcomes_is_read_up_to_the_tear(folder, tmp_path):
    run_prepare(folder, tmp_path / "out")
    before = content_of(tmp_path / "out")
    known = tmp_path / "out" / ".prepare" / "checked.tsv"
    known.write_bytes(known.read_bytes()[:-200])
    run_prepare(folder, tmp_path / "out")
    assert content_of(tmp_path / "out") == before


def test_files_that_the_index_no_longer_names_go(folder, tmp_path):
    source = WRITERS["webdataset"](folder, tmp_path / "source")
    run_prepare(source, tmp_path / "out")
    (tmp_path / "out" / "images" / "train" / "ant" / ".half.jpg.77.tmp").write_bytes(b"x")
    (source / "train-0001.tar").unlink()
    prepared = run_prepare(source, tmp_path / "out")
    left = {str(path) for path in (tmp_path / "out" / "images").rglob("*") if path.is_file()}
    assert left == {path for files in prepared.parts.values() for path in files.paths}
    assert len(prepared.parts["train"]) == 17
    run_prepare(source, tmp_path / "out", shard_bytes=20_000)
    assert not (tmp_path / "out" / "images").exists()


def test_a_changed_image_is_taken_in(tmp_path):
    source = write_image_folder(tmp_path / "images")
    run_prepare(source, tmp_path / "out")
    before = content_of(tmp_path / "out")
    changed = source / "train" / "bee" / "03.jpg"
    Image.new("RGB", (31, 17), (200, 0, 0)).save(changed)
    run_prepare(source, tmp_path / "out")
    after = content_of(tmp_path / "out")
    differing = [new for old, new in zip(before[2]["train"], after[2]["train"], strict=True) if old != new]
    assert [row[0] for row in differing] == ["bee/03.jpg"]
    assert differing[0][3] == [17, 31, 3]


def test_the_script_writes_figures_and_a_picture(folder, tmp_path):
    ended = subprocess.run(
        command(folder, tmp_path / "out", "--json", str(tmp_path / "f.json")), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "33 training and 12 test images in 3 classes" in ended.stdout
    assert json.loads((tmp_path / "f.json").read_text())["images"] == {"train": 33, "val": 12}
    sheet = np.asarray(Image.open(tmp_path / "out" / "samples.png"))
    assert sheet.shape == (3 * 96, 160 + 8 * 96, 3)
    first = Image.open(folder / "train" / "ant" / "00.jpg")
    shown = sheet[10:80, 170:240].reshape(-1, 3).mean(0)
    assert np.abs(shown - np.asarray(first.convert("RGB")).reshape(-1, 3).mean(0)).max() < 40
    assert DataConfig(source="folder", path=str(tmp_path / "out"))
