"""benchmarks/loader.py: its figures, and that its photographs resemble ImageNet's in size."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bsnas.benchmarks.parts.loading.photographs import write_photographs, write_resized
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "loader.py"
CONTENDERS = {"ours", "bare_dali", "torchvision_pil", "torchvision_decode_jpeg", "webdataset"}


@pytest.mark.slow
def test_figures(tmp_path):
    settings = ["--cases", "digits", "--rounds", "1", "--batches", "1", "--batch-size", "16", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *settings, "--cache-dir", str(tmp_path), "--json", str(tmp_path / "f.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    case = figures["cases"]["digits"]
    for field in ("images_per_s", "cpu_ms_per_image", "first_batch_s", "memory_mib"):
        assert CONTENDERS <= set(case[field]) <= CONTENDERS | {"ffcv"}
        assert min(case[field].values()) > 0
    assert "ffcv" in case["images_per_s"] or "ffcv is not installed" in case["missing"]["ffcv"]
    assert min(case["images_per_s"].values()) > 0
    speed = case["images_per_s"]
    assert case["share_of_bare_dali"] == speed["ours"] / speed["bare_dali"]
    assert case["speedup_vs_torchvision"] == speed["ours"] / speed["torchvision_pil"]


def test_bad_arguments(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rounds", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    message = " ".join(ended.stderr.replace("│", " ").split())
    assert "batch_size, batches and rounds must be at least 1, threads at least 0, and cases not empty" in message
    assert "Traceback" not in message


def test_photographs_have_the_size_of_imagenets(tmp_path):
    root = write_photographs(tmp_path / "photographs", 24)
    paths = sorted((root / "train").rglob("*.jpg"))
    assert len(paths) == 24
    assert {Image.open(path).size for path in paths} <= {(500, 375), (375, 500)}
    sizes = [path.stat().st_size for path in paths]
    assert 95_000 < np.mean(sizes) < 130_000
    assert np.std(sizes) > 10_000
    resized = sorted((write_resized(root, tmp_path / "resized") / "images" / "train").rglob("*.jpg"))
    assert {min(Image.open(path).size) for path in resized} == {256}
