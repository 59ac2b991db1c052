"""The last scripts on images of one channel: latency with parity, and peers, which take three."""

import json
from dataclasses import replace

import pytest

import bsnas.benchmarks.latency
from bsnas.benchmarks.latency import LatencyArguments, measure_run
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir, read_json, write_json
from tests.search.runs import small_space, untrained_run

ARCH = "c8:k5t3,k3t3_c8:k5t2,k7t3"


@pytest.fixture
def gray(tmp_path) -> RunDir:
    run = untrained_run(tmp_path / "run", replace(small_space(), input_channels=1))
    config = read_json(run.config_file)
    data = DataConfig(source="digits", resolution=16, channels=1, mean=(0.5,), std=(0.25,))
    write_json(run.config_file, {**config, "data": json.loads(json.dumps(data.__dict__))})
    return run


def test_networks_of_gray_images_are_timed_and_compared(gray):
    arguments = LatencyArguments(
        run=gray.path, arch=ARCH, backends=("torch-cpu", "onnxruntime-cpu"), batch_sizes=(2,), precisions=("fp32",),
        repeats=3, passes=1, warmup_seconds=0, max_seconds=0.1, images=4, threads=1,
    )  # fmt: skip
    measure_run(gray, arguments)
    rows = read_json(gray.latency_file)["rows"]
    assert [row["backend"] for row in rows] == ["torch-cpu", "onnxruntime-cpu"]
    assert all(row["p50_ms"] > 0 and row["max_abs_error"] < 1e-3 for row in rows)


def test_peers_take_three_channels(gray):
    arguments = LatencyArguments(run=gray.path, arch=ARCH, peers=(bsnas.benchmarks.latency.PEERS[0],))
    with pytest.raises(UserError, match="take images of 3 channels, and this run's have 1; leave out --peers"):
        measure_run(gray, arguments)
