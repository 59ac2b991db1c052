"""benchmarks/throughput.py: its figures, on digits."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from bsnas.benchmarks import throughput
from tests import ROOT

SCRIPT = ROOT / "benchmarks" / "throughput.py"
TIMER = {"timers": {"throughput": {"enabled": True}}}


@pytest.mark.slow
def test_figures(tmp_path):
    (tmp_path / "timer.json").write_text(json.dumps(TIMER))
    settings = ["--preset", "digits", "--batch-size", "8", "--rounds", "1", "--threads", "1"]
    settings += ["--deepspeed-config", "timer.json"]
    command = [sys.executable, str(SCRIPT), *settings, "--cache-dir", str(tmp_path), "--json", str(tmp_path / "f.json")]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    speed = figures["images_per_s"]
    assert figures["share_of_synthetic"] == pytest.approx(speed["real"] / speed["synthetic"])
    assert 0 <= figures["data_wait_share"] < 1
    assert 0 < figures["overhead_share"] < 1
    assert figures["deepspeed_config"] == TIMER
    assert figures["cuda_graphs"] is False
    assert f"{figures['share_of_synthetic']:.1%}" in ended.stdout


def test_bad_arguments(tmp_path):
    ended = subprocess.run([sys.executable, str(SCRIPT), "--rounds", "0"], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert "batch_size and rounds must be at least 1, threads at least 0" in " ".join(ended.stderr.split())


def test_waits_for_the_device_are_counted_apart(monkeypatch):
    """Figures are of rounds without a clock, which on a GPU waits in every forward, backward and step."""
    calls = []

    class Optimization:
        def forward(self): ...
        def backward(self): ...
        def step(self): ...

    class Trainer:
        process = SimpleNamespace(device=torch.device("cpu"), world_size=1)
        loader = SimpleNamespace(wait_seconds=0.0)
        network = torch.nn.Identity()
        optimization = Optimization()

        def batches(self):
            while True:
                yield torch.zeros(2, 3, 4, 4), torch.zeros(2)

        def round(self, batches):
            calls.append(self.optimization.forward.__name__)
            yield next(batches)

        def make_steps(self, steps):
            assert len(list(steps)) == 1

    monkeypatch.setattr(throughput, "Meter", lambda device: SimpleNamespace(state=lambda: torch.tensor([0, 0, 36])))
    figures = throughput.measure(Trainer(), rounds=3)
    assert calls.count("timed") == 3
    assert calls[-3:] == ["forward", "forward", "timed"]
    assert min(figures["images_per_s"].values()) > 0
