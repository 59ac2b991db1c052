"""A supernet trains on the Triton kernels as on the reference: fair rounds, both kinds of blocks, stem and tail."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from tests import ROOT

pytest.importorskip("triton")

from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import fair_round
from bsnas.kernels import set_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPACE = mobile_space(
    clusters=(mobile_cluster(blocks=2, kernels=(3, 5), expansions=(2,), channels=(8, 12), stride=2),),
    resolution=8, stem_channels=8, separable_channels=4, tail_channels=16, classes=3,
)  # fmt: skip


def train(backend: str, device: str) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of a round of paths with a step after each, and the networks' state after it."""
    torch.manual_seed(0)
    supernet = Supernet(SPACE).to(device)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9)
    x, labels = torch.randn(4, 3, 8, 8, device=device), torch.tensor([0, 1, 2, 0], device=device)
    losses = []
    set_backend(backend)
    try:
        for arch in fair_round(SPACE, seed=0, round_index=0):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(supernet(x, arch), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        set_backend(None)
    return losses, [value.detach().cpu() for value in supernet.state_dict().values()]


def compare(device: str) -> None:
    expected, expected_state = train("reference", device)
    losses, state = train("triton", device)
    assert len(set(expected)) > 1
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    for value, want in zip(state, expected_state, strict=True):
        torch.testing.assert_close(value, want, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; the next test runs it so, in a fresh process")
def test_under_the_interpreter() -> None:
    compare("cpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="runs where there is a GPU on the GPU itself")
def test_a_fresh_process_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 passed" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    compare("cuda")
