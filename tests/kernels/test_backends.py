"""What is asked of a device is asked once, and what cannot run says what to install."""

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.nvidia import driver as nvidia
from triton.runtime import build, driver

from bsnas.kernels import backends, choose_backend, set_backend

ON_GPU: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, is_cuda=True)


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    backends.forget()
    yield
    backends.forget()


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An H100 as far as torch and Triton look before the driver is built, which is in nobody's cache."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", staticmethod(lambda: True))
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.delattr(nvidia.CudaUtils, "instance", raising=False)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    build._find_compiler.cache_clear()


def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    return "Failed to find C compiler"


def no_such_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    return "No such file or directory"


def no_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fatal error: Python.h: No such file or directory' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    return "returned non-zero exit status 1"


@pytest.mark.parametrize("missing", [no_compiler, no_such_compiler, no_headers])
def test_where_triton_cannot_build_its_driver_plain_torch_runs(
    missing: Any, a_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = missing(monkeypatch, tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [choose_backend(ON_GPU) for _ in range(3)] == ["reference"] * 3
        assert choose_backend(ON_GPU, work="score") == "reference"
    (warning,) = caught
    message = str(warning.message)
    assert "blocks run on plain torch, which is slower: Triton's driver cannot be built here: " in message
    assert reason in message
    assert "install a C compiler and Python's headers (apt-get install gcc python3-dev)" in message
    for work in ("train", "score"):
        with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run: Triton's driver cannot be built here: "):
            choose_backend(ON_GPU, "triton", work)


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: asked.append(name) or find_spec(name))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    monkeypatch.setattr(backends, "driver_fault", lambda: asked.append("driver"))
    half: Any = SimpleNamespace(**vars(ON_GPU) | {"dtype": torch.float16})
    for _ in range(21):
        assert choose_backend(ON_GPU) == choose_backend(half) == "triton"
        assert choose_backend(torch.ones(1)) == "onednn"
    assert asked == ["triton", ON_GPU.device, "driver"] * 2


def test_a_backend_can_be_forced_after_another_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    assert choose_backend(x) == "onednn"
    assert choose_backend(x, "reference") == "reference"
    monkeypatch.setenv("BSNAS_KERNELS", "reference")
    assert choose_backend(x) == "reference"
    set_backend("onednn")
    try:
        assert choose_backend(x) == "onednn"
    finally:
        set_backend(None)
    monkeypatch.delenv("BSNAS_KERNELS")
    with torch.autocast("cpu", torch.bfloat16):
        assert choose_backend(x) == "reference"
    assert choose_backend(x) == "onednn"
