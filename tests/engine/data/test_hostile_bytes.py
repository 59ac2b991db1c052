"""Bytes that a native decoder refuses, in the check and whenever a file changes after it: a line, never a signal."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bsnas.benchmarks.parts.faults.hostile_images import write_folder
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


@pytest.mark.parametrize("moment", ["before", "after"])
def test_spoilt_bytes_end_nothing_by_a_signal(tmp_path, moment):
    """A small part of `benchmarks/soak.py --parts images`."""
    seed = {"before": 2, "after": 3}[moment]
    write_folder(tmp_path / "images", seed)
    module = "bsnas.benchmarks.parts.faults.hostile_images"
    done = run_script("-m", module, str(tmp_path / "images"), str(seed), moment, cwd=ROOT)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    line = done.stdout.splitlines()[-1]
    assert line.startswith(("told of", "read beside"))
    assert "image" in line or moment == "before"


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
