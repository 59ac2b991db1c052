"""benchmarks/throughput.py: its figures, on digits."""

import json
import subprocess
import sys

import pytest

from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "throughput.py"


@pytest.mark.slow
def test_figures(tmp_path):
    settings = ["--preset", "digits", "--batch-size", "8", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *settings, "--cache-dir", str(tmp_path), "--json", str(tmp_path / "f.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    speed = figures["images_per_s"]
    assert figures["share_of_synthetic"] == pytest.approx(speed["real"] / speed["synthetic"])
    assert 0 <= figures["data_wait_share"] < 1
    assert 0 < figures["overhead_share"] < 1
    assert f"{figures['share_of_synthetic']:.1%}" in ended.stdout


def test_bad_arguments(tmp_path):
    ended = subprocess.run([sys.executable, str(SCRIPT), "--rounds", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "batch_size and rounds must be at least 1, threads at least 0" in " ".join(ended.stderr.split())
