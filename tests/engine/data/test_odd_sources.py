"""Sources with odd names: each file is kept, set aside with a reason, or left out by a rule; and the counts add up."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.file_list import CLUTTER, IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES, is_hidden
from bsnas.engine.data.preparing.formats.open_source import open_source
from bsnas.engine.data.preparing.formats.sample import ClassNames, LeftOut, Problem, Sample
from bsnas.engine.data.preparing.preparation import summary
from bsnas.engine.data.preparing.stored_images import Resizing, stored_name
from bsnas.engine.host.errors import UserError
from tests.engine.data.cases import CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, folder_config, write_image_folder
from tests.engine.data.source_cases import WRITERS, add, error_of, prepare_source

TRAIN, VAL = 3 * TRAIN_PER_CLASS, 3 * VAL_PER_CLASS


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


def some_image(folder: Path) -> bytes:
    return sorted(folder.glob("train/*/*.jpg"))[0].read_bytes()


def test_every_name_of_a_jpeg_is_taken(folder, tmp_path):
    for number, file in enumerate(sorted(folder.glob("*/*/*.jpg"))):
        file.rename(file.with_suffix((".jfif", ".jpe", ".JPG", ".jpeg")[number % 4]))
    prepared = prepare_source(folder, tmp_path / "out")
    assert {part: len(files) for part, files in prepared.parts.items()} == {"train": TRAIN, "val": VAL}
    assert len(open_dataset(folder_config(folder, tmp_path / "cache")).everything) == TRAIN


@pytest.mark.parametrize("suffix", [".gif", ".HEIC", ".avif"])
def test_an_image_that_is_not_read_is_named_with_the_way_out(folder, tmp_path, suffix):
    (folder / "train" / "ant" / f"odd{suffix}").write_bytes(b"GIF89a")
    reason = f"is a {suffix[1:].upper()} file by its name, which the decoder does not read; convert it to JPEG or PNG"
    prepared = prepare_source(folder, tmp_path / "out", max_broken=0.1)
    assert prepared.set_aside == [(f"train/ant/odd{suffix}", reason)]
    assert f"ant/odd{suffix} {reason}" in error_of(open_dataset, folder_config(folder, tmp_path / "c", max_broken=0.0))


def test_what_a_system_left_is_left_out_by_every_reader(folder, tmp_path):
    for part in ("train", "val"):
        for place in ("._00.jpg", "@eaDir/00.jpg", "__MACOSX/ant/00.jpg", ".DS_Store", ".hidden/00.jpg"):
            file = folder / part / "ant" / place
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"no image")
        (folder / part / "@eaDir").mkdir()
        (folder / part / "ant" / "notes.txt").touch()
        (folder / part / "@eaDir" / "x.jpg").touch()
        (folder / part / "loose.jpg").touch()
    (folder / "readme.md").touch()
    expected = {
        "hidden or of the system": 12, "named .txt": 2, "outside of the class directories": 2,
        "outside of the parts": 1,
    }  # fmt: skip
    prepared = prepare_source(folder, tmp_path / "out")
    assert summary(prepared)["left_out"] == expected
    assert prepared.set_aside == []
    assert (len(prepared.parts["train"]), len(prepared.parts["val"])) == (TRAIN, VAL)
    assert len(open_dataset(folder_config(folder, tmp_path / "cache")).everything) == TRAIN

    shards = tmp_path / "shards"
    shards.mkdir()
    for part in ("train", "val"):
        with tarfile.open(shards / f"{part}.tar", "w") as tar:
            for file in sorted(folder.glob(f"{part}/*/*.jpg")):
                if not is_hidden(str(file.relative_to(folder))):
                    add(tar, str(file.relative_to(folder / part)), file.read_bytes())
                    add(tar, f"{file.parent.name}/._{file.name}", b"AppleDouble")
    (shards / "._train.tar").write_bytes(b"AppleDouble")
    prepared = prepare_source(shards, tmp_path / "out2")
    assert (len(prepared.parts["train"]), len(prepared.parts["val"])) == (TRAIN, VAL)
    assert prepared.left_out == {"hidden or of the system": TRAIN + VAL + 1}


def test_a_hidden_archive_does_not_tell_what_a_source_is(folder, tmp_path):
    source = classes_named(tmp_path / "plain", some_image(folder), "a", "b")
    (source / "a" / "._shard.tar").write_bytes(b"AppleDouble")
    (source / ".cache" / "deep").mkdir(parents=True)
    prepared = prepare_source(source, tmp_path / "out", val_share=0.25)
    assert (prepared.classes, sum(map(len, prepared.parts.values()))) == (("a", "b"), 24)


def test_members_with_one_key_are_all_kept(folder, tmp_path):
    content, source = some_image(folder), tmp_path / "shards"
    source.mkdir()
    for part in ("train", "val"):
        with tarfile.open(source / f"{part}.tar", "w") as tar:
            for name in CLASSES:
                for number in range(1, 5):
                    add(tar, f"{name}/IMG_2015.{number}.jpg", content + bytes([number]))
    prepared = prepare_source(source, tmp_path / "out")
    assert len(prepared.parts["train"]) == len(prepared.parts["val"]) == 12
    assert prepared.set_aside == []
    assert len(set(prepared.parts["train"].files)) == 12


def test_labels_of_views_are_those_of_their_name_or_of_their_sample(folder, tmp_path):
    content, source = some_image(folder), tmp_path / "shards"
    source.mkdir()
    for part in ("train", "val"):
        with tarfile.open(source / f"{part}.tar", "w") as tar:
            for number in range(3):
                add(tar, f"{number}.left.jpg", content + b"l")
                add(tar, f"{number}.right.jpg", content + b"r")
                add(tar, f"{number}.cls", b"bee")
                add(tar, f"{number}.right.cls", b"cat")
                add(tar, f"{number}.txt", b"a caption")
    prepared = prepare_source(source, tmp_path / "out")
    assert prepared.parts["train"].names == (
        *(f"bee/{number}.left.jpg" for number in range(3)), *(f"cat/{number}.right.jpg" for number in range(3))
    )  # fmt: skip
    assert prepared.left_out == {"named .txt": 6}


# ---- classes with names of parts


def classes_named(directory: Path, content: bytes, *names: str) -> Path:
    for name in names:
        for number in range(12):
            (directory / name).mkdir(parents=True, exist_ok=True)
            (directory / name / f"{number}.jpg").write_bytes(content + bytes([number]))
    return directory


@pytest.mark.parametrize("kind", ["auto", "folder", "classes"])
@pytest.mark.parametrize("names", [("bus", "car", "train"), ("test", "train")])
def test_classes_may_be_named_like_parts(folder, tmp_path, kind, names):
    source = classes_named(tmp_path / "coco", some_image(folder), *names)
    prepared = prepare_source(source, tmp_path / "out", kind=kind, val_share=0.25)
    assert prepared.classes == names
    assert sum(map(len, prepared.parts.values())) == 12 * len(names)


def test_where_both_can_be_meant_the_user_says_which(folder, tmp_path):
    source = classes_named(tmp_path / "coco", some_image(folder), "bus", "car", "train/red", "train/blue", "val/red")
    message = error_of(open_source, source, "folder", class_file=None, val_labels=None)
    assert message == (
        f"{source} can be read in two ways: train, val as parts of a data set, without bus, car; or each of its "
        "directories as a class; say which with --format parts or --format classes"
    )
    classes = prepare_source(source, tmp_path / "a", kind="classes", val_share=0.25).classes
    assert classes == ("bus", "car", "train", "val")
    assert prepare_source(source, tmp_path / "b", kind="parts").classes == ("blue", "red")


def test_what_lies_beside_the_parts_without_images_says_nothing(folder, tmp_path):
    (folder / "annotations").mkdir()
    (folder / "annotations" / "all.json").touch()
    assert prepare_source(folder, tmp_path / "out").classes == CLASSES


def test_parts_that_are_not_there(folder):
    with pytest.raises(
        UserError, match=r"holds none of train, training, val, .*; give --format classes for CLASS/IMAGE"
    ):
        open_source(folder / "train", "parts", class_file=None, val_labels=None)


def test_two_directories_of_one_part_are_told(folder, tmp_path):
    shutil.copytree(folder / "val", folder / "validation")
    assert error_of(prepare_source, folder, tmp_path / "out") == (
        f"{folder} holds train, val, validation, of which several name the same part; join them, or give --format "
        "classes where they are classes"
    )


def test_a_part_that_is_not_used_is_counted(folder, tmp_path):
    shutil.copytree(folder / "val", folder / "test")
    assert prepare_source(folder, tmp_path / "out").left_out == {"of the part test, where val is there": VAL}


def test_one_class_and_no_test_images_end_a_preparation(folder, tmp_path):
    source = classes_named(tmp_path / "flat", some_image(folder), "train/images", "val/images")
    assert "the source holds one class, images, and a classifier needs two" in error_of(
        prepare_source, source, tmp_path / "out"
    )
    for file in (folder / "val").glob("*/*"):
        file.write_bytes(b"")
    message = error_of(prepare_source, folder, tmp_path / "out2", max_broken=1.0)
    assert message.startswith(f"all {VAL} test images of the source are set aside, the first is val/ant/")
    source = classes_named(tmp_path / "other", some_image(folder), "train/a", "train/b", "val/c")
    message = error_of(prepare_source, source, tmp_path / "out3", max_broken=1.0)
    assert message.startswith("all 12 test images of the source are set aside, the first is val/c/0.jpg; mend them")


# ---- what is written


def test_two_inputs_never_share_an_output(folder, tmp_path):
    content = some_image(folder)
    png = io.BytesIO()
    from PIL import Image

    Image.open(io.BytesIO(content)).save(png, "PNG")
    names = ("x.png", "x.png.jpg", "a\x01b.jpg", "a_b.jpg")
    for name in names:
        (folder / "train" / "ant" / name).write_bytes(png.getvalue() if name.endswith(".png") else content)
    prepared = prepare_source(folder, tmp_path / "out", resizing=Resizing(shorter=8, quality=90, channels=3))
    files = prepared.parts["train"].files
    assert len(set(files)) == len(files) == TRAIN + len(names)
    assert prepared.set_aside == []


def test_a_name_as_long_as_a_file_system_allows_is_stored(folder, tmp_path):
    long = "n" * 246 + ".png"
    sorted(folder.glob("train/ant/*"))[0].rename(folder / "train" / "ant" / long)
    prepared = prepare_source(folder, tmp_path / "out", resizing=Resizing(shorter=8, quality=90, channels=3))
    assert prepared.set_aside == []
    other = stored_name("train", "ant/" + "n" * 245 + "m.png", None)
    assert other != stored_name("train", f"ant/{long}", None)
    assert max(map(len, Path(other).parts)) < 255


# ---- everything is accounted for

SUFFIXES = [*sorted(IMAGE_SUFFIXES)[:4], ".gif", ".heic", ".txt", "", ".json"]
FILES = st.lists(
    st.tuples(
        st.sampled_from(["", "._", "."]), st.sampled_from(["x", "y.1", "y.2", "z"]), st.sampled_from(SUFFIXES),
        st.sampled_from(["", "deep/", *(f"{name}/" for name in sorted(CLUTTER)[:2])]), st.booleans(),
    ),
    max_size=12, unique_by=lambda file: file[:4],
)  # fmt: skip


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=FILES)
def test_what_is_found_is_kept_set_aside_or_left_out(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("sources")
    content = some_image(write_image_folder(root / "good"))
    for part in ("train", "val"):
        for name in ("one", "two"):
            (root / "source" / part / name).mkdir(parents=True)
            (root / "source" / part / name / "good.jpg").write_bytes(content)
    written = []
    for start, stem, suffix, place, whole in files:
        name = f"{place}{start}{stem}{suffix}"
        file = root / "source" / "train" / "one" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if whole else b"junk")
        written.append(name)
    shards = root / "shards"
    shards.mkdir()
    for part in ("train", "val"):
        with tarfile.open(shards / f"{part}.tar", "w") as tar:
            for file in sorted((root / "source" / part).rglob("*")):
                if file.is_file():
                    add(tar, str(file.relative_to(root / "source" / part)), file.read_bytes())
    for source in (root / "source", shards):
        reader = open_source(source, "auto", class_file=None, val_labels=None)
        items = list(reader.samples())
        samples = [item for item in items if isinstance(item, Sample)]
        problems = [item for item in items if isinstance(item, Problem)]
        left_out = sum(item.count for item in items if isinstance(item, LeftOut))
        labels_without_image = len(
            [p for p in problems if p.reason in ("has no image", "is no label that can be read")]
        )
        assert (
            len(samples) + len(problems) - labels_without_image + left_out + labels_of(source, shards, written)
            == len(written) + 4
        )
        names = {(sample.part, sample.name) for sample in samples}
        assert len(names) == len(samples)
        assert not [s for s in samples if is_hidden(s.name) or Path(s.name).suffix.lower() in OTHER_IMAGE_SUFFIXES]


@pytest.mark.parametrize("kind", WRITERS)
def test_every_image_of_every_format_is_an_item(folder, tmp_path, kind):
    sorted(folder.glob("train/ant/*"))[0].write_bytes(b"junk")
    reader = open_source(WRITERS[kind](folder, tmp_path / "source"), "auto", class_file=None, val_labels=None)
    items = list(reader.samples())
    left_out = sum(item.count for item in items if isinstance(item, LeftOut))
    assert len([item for item in items if not isinstance(item, LeftOut)]) == TRAIN + VAL
    assert left_out == 0
    prepared = prepare_source(
        WRITERS[kind](folder, tmp_path / "again"), tmp_path / "out", max_broken=0.1, class_file=None
    )
    assert sum(map(len, prepared.parts.values())) + len(prepared.set_aside) == TRAIN + VAL
    assert len(prepared.set_aside) == 1


def labels_of(source: Path, shards: Path, written: list[str]) -> int:
    """Members of shards that are labels, which belong to a sample."""
    if source != shards:
        return 0
    return sum(name.endswith(".json") and not is_hidden(name) for name in written)


# ---- texts


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_csv_of_any_encoding_of_spreadsheets(folder, tmp_path, encoding):
    rows = [
        f"{file.relative_to(folder)},{file.parent.name},{file.parts[-3]}" for file in sorted(folder.glob("*/*/*.jpg"))
    ]
    text = "\n".join(["path,label,split", *rows])
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    (folder / "list.csv").write_bytes(mark + text.encode(encoding))
    prepared = prepare_source(folder / "list.csv", tmp_path / "out")
    assert (prepared.classes, len(prepared.parts["train"])) == (CLASSES, TRAIN)


def test_a_zero_byte_in_a_path_is_a_problem_of_its_line(folder, tmp_path):
    files = sorted(folder.glob("*/*/*.jpg"))
    rows = [f"{file.relative_to(folder)},{file.parent.name},{file.parts[-3]}" for file in files]
    (folder / "list.csv").write_text("\n".join(["path,label,split", "a\0b.jpg,ant,train", *rows]))
    prepared = prepare_source(folder / "list.csv", tmp_path / "out", max_broken=0.1)
    assert prepared.set_aside == [("line 2: a\0b.jpg", "is no path: it holds a zero byte")]


def test_a_byte_order_mark_is_no_part_of_a_class_name(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n", "utf-8-sig")
    rows = [f"{file.relative_to(folder)},{CLASSES.index(file.parent.name)},{file.parts[-3]}" for file in
            sorted(folder.glob("*/*/*.jpg"))]  # fmt: skip
    (folder / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    prepared = prepare_source(folder / "list.csv", tmp_path / "out", class_file=tmp_path / "classes.txt")
    assert prepared.classes == CLASSES


def test_names_that_are_no_text_are_printed_all_the_same(tmp_path):
    program = (
        "import sys\nfrom bsnas.engine.host.script import run\n"
        "def main(): print('caf\\udce9'); print('caf\\udce9', file=sys.stderr)\nrun(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9\n", "caf\\udce9\n")


def test_labels_that_would_share_a_directory_are_told_apart():
    classes = ClassNames(None)
    assert classes.of("a_b") == "a_b"
    with pytest.raises(KeyError, match="has label 'a/b', whose directory a_b is that of label 'a_b'; rename one"):
        classes.of("a/b")
    for missing in (None, float("nan")):
        with pytest.raises(KeyError, match="has no label"):
            classes.of(missing)
    assert ClassNames(("cat", "dog")).of(1) == "dog"
