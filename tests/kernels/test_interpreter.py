"""Runs test_triton.py under Triton's interpreter, which only a fresh process can choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py ran on the GPU itself")
def test_triton_kernels_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__).parent / "test_triton.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
