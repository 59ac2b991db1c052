"""Benchmarks of the loader: their figures; photographs like ImageNet's in size; miniatures that can be learned."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bsnas.benchmarks.loader_augmentations import grey_levels
from bsnas.benchmarks.miniatures import CLASSES, MiniatureArguments, miniature, write_miniatures
from bsnas.benchmarks.parts.loading.photographs import write_photographs, write_resized
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.host.errors import UserError
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "loader.py"
AUGMENTATIONS = SCRIPT.with_name("loader_augmentations.py")
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


@pytest.mark.slow
def test_figures_of_augmentations(tmp_path):
    settings = ["--cases", "erase", "cutmix", "cpu-decode", "--images", "32", "--batch-size", "16", "--batches", "2"]
    settings += ["--rounds", "1", "--resolution", "32", "--threads", "1", "--cache-dir", str(tmp_path)]
    command = [sys.executable, str(AUGMENTATIONS), *settings, "--json", str(tmp_path / "f.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    cases = figures["cases"]
    assert list(cases) == ["crop", "erase", "cutmix"]  # without a GPU there is no other decoder to share with
    assert figures["precision"] == "fp32"
    assert cases["crop"]["images_changed"] == 0
    assert 0 < cases["erase"]["images_changed"] < 0.6
    assert cases["cutmix"]["images_changed"] > 0.6
    assert cases["erase"]["speed_against_crop"] == pytest.approx(
        cases["erase"]["images_per_s"] / cases["crop"]["images_per_s"]
    )


def test_bad_arguments_of_augmentations(tmp_path):
    command = [sys.executable, str(AUGMENTATIONS), "--images", "100"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "100 images, batches of 64, 60 batches, 3 rounds: each must be at least 1" in ended.stderr


def test_miniatures_are_told_apart_by_their_stripes_and_not_by_their_colours():
    """By the nearest class mean of a spectrum, which knows no place; means of colours know nothing."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % len(CLASSES)
    pixels = np.stack([np.asarray(miniature(rng, int(label)), float) for label in labels])
    gray = pixels.mean(-1) - pixels.mean((1, 2, 3))[:, None, None]
    spectra = np.abs(np.fft.fft2(gray)).reshape(len(labels), -1)
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)

    def share_right(features):
        known, asked = slice(0, 300), slice(300, 400)
        means = np.stack([features[known][labels[known] == label].mean(0) for label in range(len(CLASSES))])
        distances = np.linalg.norm(features[asked][:, None] - means[None], axis=-1)
        return float((distances.argmin(1) == labels[asked]).mean())

    assert 0.75 < share_right(spectra) < 1
    assert share_right(pixels.mean((1, 2))) < 0.3


def test_miniatures_are_written_once(tmp_path):
    root = write_miniatures(tmp_path / "images", train=20, test=10)
    files = sorted(root.rglob("*.jpg"))
    assert len(files) == 30
    assert len({file.parent.name for file in files}) == len(CLASSES)
    assert {Image.open(file).size for file in files} == {(32, 32)}
    changed = files[0].stat().st_mtime_ns
    write_miniatures(tmp_path / "images", train=20, test=10)
    assert files[0].stat().st_mtime_ns == changed


def test_miniatures_of_every_class_are_asked_for():
    with pytest.raises(UserError, match=r"train 5, test 10: give at least 10, one for each class"):
        MiniatureArguments(output=Path("images"), train=5, test=10)


def test_pixels_and_labels_that_a_loader_makes_up_are_found():
    expected = torch.zeros(2, 3, 4, 4), torch.zeros(2)
    with pytest.raises(RuntimeError, match="the loader gave values that are not finite"):
        grey_levels((expected[0] + float("nan"), expected[1]), expected, DataConfig(source="digits"))
    with pytest.raises(RuntimeError, match="the loader gave other labels than on the CPU"):
        grey_levels((expected[0], expected[1] + 1), expected, DataConfig(source="digits"))
