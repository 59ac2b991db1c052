"""Bytes that a native decoder refuses, in the check and whenever a file changes after it: a line, never a signal."""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsnas.engine.data.contents import unchanged_paths
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.errors import UserError
from tests import ROOT
from tests.engine.data.cases import folder_config, write_image_folder

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3)).astype(np.uint8))


def odd_webp() -> bytes:
    """What Pillow writes for metadata of an odd number of bytes: a chunk without its padding byte."""
    exif = Image.Exif()
    exif[0x10E] = "a description"
    for more in range(8):
        buffer = io.BytesIO()
        PICTURE.save(buffer, "WEBP", lossless=True, exif=exif.tobytes() + b"x" * more)
        content = buffer.getvalue()
        place = content.find(b"EXIF")
        if place > 0 and int.from_bytes(content[place + 4 : place + 8], "little") % 2:
            return content
    raise AssertionError("Pillow pads the chunk now: the case is gone")


def run_script(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize("attempt", range(3))
def test_webp_that_only_pillow_reads_is_set_aside_with_a_way_out(tmp_path, attempt):
    folder = write_image_folder(tmp_path / "images")
    good = io.BytesIO()
    PICTURE.save(good, "WEBP", lossless=True)
    for number in range(120):
        file = folder / "train" / ("ant", "bee")[number % 2] / f"{number}.webp"
        file.write_bytes(odd_webp() if number % 4 < 2 else good.getvalue())
    prepare = str(ROOT / "engine/prepare.py"), "--source", "images", "--max-broken", "0.5", "--val-per-class", "1"
    done = run_script(*prepare, "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60 of" in done.stdout
    quarantine = (tmp_path / "out" / "quarantine.tsv").read_text()
    assert quarantine.count("convert it to JPEG or PNG, or use --resize") == 60
    assert "damaged" not in quarantine
    done = run_script(*prepare, "--output", "resized", "--resize", "32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "resized" / "quarantine.tsv").read_text() == ""


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """Flipped, zeroed, cut or swapped bytes, anywhere or in the header."""
    changed, end = bytearray(content), rng.choice((64, len(content)))
    first = rng.randrange(2, end)
    length = rng.choice((1, 4, 40))
    match rng.randrange(5):
        case 0:
            changed[first] ^= 1 << rng.randrange(8)
        case 1:
            changed[first : first + length] = bytes(length)
        case 2:
            return bytes(changed[:first])
        case 3:
            changed[first], changed[-first] = changed[-first], changed[first]
        case 4:
            changed[first:first] = bytes(rng.randrange(256) for _ in range(length))
    return bytes(changed)


READ = """
import sys
from pathlib import Path
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.data.loading.loader import TrainLoader
from bsnas.engine.host.errors import UserError
from tests.engine.data.cases import folder_config
from tests.engine.data.test_hostile_bytes import spoil_some

folder, seed, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = folder_config(folder, folder.parent / f"cache-{seed}", max_broken=1.0, val_per_class=1, threads=4)
if moment == "before":
    spoil_some(folder, seed)
try:
    dataset = open_dataset(config)
    if moment == "after":
        spoil_some(folder, seed)
    evaluation_set(dataset.everything, config)
    list(TrainLoader(dataset.train, config, batch_size=64, seed=0, drop_last=False).epoch(0))
    print("read")
except UserError as error:
    print("told:", error)
"""


def spoil_some(folder: Path, seed: int) -> None:
    """Half of the images, several in each batch."""
    rng = random.Random(seed)
    for file in sorted(folder.glob("*/*/*")):
        if rng.random() < 0.5:
            file.write_bytes(spoilt(file.read_bytes(), rng))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("seed", range(3))
def test_spoilt_bytes_end_nothing_by_a_signal(tmp_path, seed, moment):
    folder = tmp_path / "images"
    rng = random.Random(seed)
    for number in range(160):
        suffix, name = rng.choice((("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("bmp", "BMP"), ("tif", "TIFF")))
        file = folder / ("train", "train", "val")[number % 3] / ("one", "two")[number % 2] / f"{number}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(file, name)
    done = run_script("-c", READ, str(folder), str(seed), moment, cwd=ROOT)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.splitlines()[-1].startswith("told: image" if moment == "after" else ("read", "told:"))


def test_a_file_that_is_written_anew_after_its_check(tmp_path):
    folder = write_image_folder(tmp_path / "images")
    config = folder_config(folder, tmp_path / "cache")
    files = open_dataset(config).everything
    first, second, third = (Path(files.path(place)) for place in range(3))
    content = first.read_bytes()
    first.write_bytes(content)  # the same: compared once
    assert unchanged_paths(files, [0]) == [str(first).encode()]
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"image .* has changed since it was checked; bring it back, or start again"):
        unchanged_paths(files, [0])
    third.unlink()
    with pytest.raises(UserError, match=r"image .* cannot be read \(No such file or directory\); remove or replace it"):
        unchanged_paths(files, [2])
