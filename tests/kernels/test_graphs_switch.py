"""The switch of the CUDA graphs where they cannot run: it says why, through every way in."""

import re
from pathlib import Path

import pytest
import torch

from bsnas.kernels import BlockShape, BlockWeights, choose_backend, graphs, inverted_residual
from tests import script

CANNOT = r"CUDA graphs cannot run: they need an NVIDIA GPU and the tensor is on cpu; leave BSNAS_CUDA_GRAPHS unset"


@pytest.fixture(params=["variable", "function"])
def switched_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_switch", None)
    if request.param == "variable":
        monkeypatch.setenv("BSNAS_CUDA_GRAPHS", "1")
    else:
        graphs.set_cuda_graphs(True)


@pytest.mark.usefixtures("switched_on")
def test_a_cpu_says_why_nothing_is_captured() -> None:
    shape, weights = BlockShape(4, 8, 4, 3, 1), BlockWeights(torch.ones(8, 4), torch.ones(8, 1, 3, 3), torch.ones(4, 8))
    bns = tuple(torch.nn.BatchNorm2d(c) for c in (8, 8, 4))
    with pytest.raises(RuntimeError, match=CANNOT):
        inverted_residual(torch.ones(2, 4, 3, 3), weights, bns, shape, training=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "words", [("benchmarks/throughput.py", "--preset", "digits"), ("search/finals.py", "--run", "x")]
)
def test_every_script_refuses_it_in_one_line(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSNAS_CUDA_GRAPHS", "1")
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {CANNOT}.*\n", done.stderr), done.stderr


def test_off_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BSNAS_CUDA_GRAPHS", "1")
    monkeypatch.setattr(graphs, "_switch", False)
    assert choose_backend(torch.ones(1), "reference") == "reference"


def test_only_triton_kernels_are_recorded() -> None:
    class OnGpu:
        is_cuda = True

    assert "record the Triton kernels and the backend is 'reference'" in str(graphs.why_not(OnGpu(), "reference"))  # type: ignore[arg-type]
    assert graphs.why_not(OnGpu(), "triton") is None  # type: ignore[arg-type]
