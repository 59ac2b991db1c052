"""What an installation holds, beside other packages; and what a script says where there is none."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import ROOT

SCRIPTS = [
    file.relative_to(ROOT).as_posix()
    for package in ("engine", "search", "benchmarks")
    for file in sorted((ROOT / package).glob("*.py"))
    if '__name__ == "__main__"' in (text := file.read_text()) and "from bsnas" in text
]
TRAIN = (
    *("--preset", "digits", "--optimizer.warmup-epochs", "0", "--optimizer.batch-size", "96", "--shrink.keep", "9"),
    *("--shrink.first-epochs", "1", "--shrink.interval-epochs", "1", "--shrink.models-per-operation", "1"),
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_an_installation_says_what_to_do(script: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(ROOT / script)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: bsnas is not installed in this Python; run `make env`")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools writes beside them."""
    place = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    subprocess.run(["tar", "--create", "--null", "--files-from=-", "--file", place / "sources.tar"], input=files,
                   cwd=ROOT, check=True)  # fmt: skip
    (place / "sources").mkdir()
    subprocess.run(["tar", "--extract", "--file", place / "sources.tar", "--directory", place / "sources"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", place, place / "sources"], check=True)
    (file,) = place.glob("bsnas-*.whl")
    return file


def test_a_wheel_installs_nothing_but_bsnas(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bsnas"}
    code = {f"bsnas/{file.relative_to(ROOT)}" for package in ("engine", "kernels", "search", "benchmarks")
            for file in (ROOT / package).rglob("*.py")}  # fmt: skip
    data = {"bsnas/kernels/cpu/native.cpp", "bsnas/kernels/gpu/configs/nvidia-h100.json",
            "bsnas/search/reporting/page.css", "bsnas/search/reporting/page.js"}  # fmt: skip
    assert code | data <= set(names)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python where the wheel is installed beside a foreign package `kernels`, in another directory."""
    place = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place / "site", wheel]
    subprocess.run(command, check=True)
    (place / "site/kernels").mkdir()
    (place / "site/kernels/__init__.py").write_text("FOREIGN = True\n")

    def python(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(place / "site"), "PYTHONSAFEPATH": "1"}
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=place, env=environment, timeout=250
        )

    return python


def test_a_foreign_package_named_kernels_and_ours_live_together(installed: Callable[..., object]) -> None:
    program = (
        "import kernels, bsnas.kernels; assert kernels.FOREIGN; "
        "print(bsnas.kernels.__file__, hasattr(bsnas.kernels, 'inverted_residual'))"
    )
    done = installed("-c", program)
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    where, ours = done.stdout.split()  # type: ignore[attr-defined]
    assert "/site/bsnas/" in where
    assert ours == "True"


@pytest.mark.slow
def test_the_pipeline_runs_from_a_wheel(
    installed: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for module, options in (
        ("bsnas.engine.train", [*TRAIN, "--data.cache-dir", str(tmp_path / "cache")]),
        ("bsnas.search.evolve", ["--max-macs", "4M", "--population", "6", "--iterations", "1"]),
        ("bsnas.engine.retrain", ["--epochs", "1"]),
        ("bsnas.engine.export", ["--json", str(tmp_path / "export.json")]),
        ("bsnas.engine.status", []),
    ):
        done = installed("-m", module, "--run", str(run), *options)
        assert done.returncode == 0, f"{module}: {done.stderr}"
    assert json.loads((tmp_path / "export.json").read_text())["weights"] == "retrained"
