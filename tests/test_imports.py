"""Imports run one way, between packages and between their folders; what needs no torch, or no DALI, loads none.

The order of a package is the order of its folders below: nothing imports what stands behind it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bsnas.engine.presets import preset
from bsnas.engine.runs.rundir import RunDir
from tests import ROOT

PACKAGES = ("kernels", "engine", "search", "benchmarks", "tests")
ORDER = {
    "kernels": (
        "plan", "block", "reference", "graphs", "compiler", "cpu", "gpu", "backends", "training", "inference", "tools",
    ),
    "engine": (
        "host", "space", "networks", "data", "config", "presets", "runs", "checkpoints", "evaluation", "training",
        "release", "prepare", "train", "retrain", "export", "status",
    ),
    "search": ("backends", "latency_tables", "algorithms", "runs", "reporting", "run_time", "latency", "evolve",
        "finals", "report", "space",
    ),
}  # fmt: skip
"""The folders and modules of each package, each before what may import it."""
NO_TORCH = (
    "engine/space", "engine/config.py", "engine/host/errors.py", "engine/host/launcher.py", "engine/host/preemption.py",
    "engine/host/script.py", "engine/runs/rundir.py", "engine/runs/facts.py",
    "engine/evaluation/tree.py", "engine/data/dataset.py", "search/latency_tables/model.py",
    "search/latency_tables/network_parts.py", "engine/status.py",
)  # fmt: skip
"""Folders and files whose modules load without torch."""
DALI_ALLOWED = (
    "engine/data/loading", "engine/data/checking/image_check.py", "benchmarks/parts/loading", "benchmarks/loader.py"
)  # fmt: skip
MOST_MODULES = {"engine": 12, "search": 8}
"""Modules that lie directly in a package: its scripts and little else."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that the file imports anywhere, function bodies included, by its full name."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # each may be a module


def ours(file: Path) -> Iterator[tuple[str, ...]]:
    """Of the imported modules those of this project, as (package, folder or module, ...)."""
    for name in imported_modules(file):
        first, *rest = name.split(".")
        if first == "bsnas" and rest:
            yield tuple(rest)
        elif first == "tests":
            yield (first, *rest)


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_no_package_imports_a_later_one(package: str) -> None:
    later = set(PACKAGES[PACKAGES.index(package) + 1 :])
    assert sources(package), f"no files under {package}/"
    wrong = {
        f"{file.relative_to(ROOT)} imports {'.'.join(name)}"
        for file in sources(package)
        for name in ours(file)
        if name[0] in later
    }
    assert not wrong


@pytest.mark.parametrize("package", ORDER)
def test_inside_a_package_imports_run_in_the_order_of_its_folders(package: str) -> None:
    order = ORDER[package]
    there = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there - {"__init__"} == set(order), "a folder has no place in the order"
    wrong = set()
    for file in sources(package):
        place = file.relative_to(ROOT / package).parts[0].removesuffix(".py")
        for name in ours(file):
            if place in order and name[0] == package and len(name) > 1 and name[1] in order[order.index(place) + 1 :]:
                wrong.add(f"{file.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_modules_are_imported_by_the_name_that_an_installation_has(package: str) -> None:
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for folder in (package, "tests", "docs")
        for file in sources(folder)
        for name in imported_modules(file)
        if name.split(".")[0] in PACKAGES[:-1]
    }
    assert not wrong


@pytest.mark.parametrize("package", MOST_MODULES)
def test_a_package_is_folders_not_a_hall(package: str) -> None:
    assert len(list((ROOT / package).glob("*.py"))) <= MOST_MODULES[package]


def test_only_the_loader_knows_dali() -> None:
    files = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES[:-1]
        for file in sources(package)
        if any(name.split(".")[0] == "nvidia" for name in imported_modules(file))
    }
    assert files, "no file imports DALI"
    assert not {file for file in files if not file.startswith(DALI_ALLOWED)}


def test_what_needs_no_torch_loads_none() -> None:
    names = [
        "bsnas." + ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for place in NO_TORCH
        for file in (sources(place) if (ROOT / place).is_dir() else [ROOT / place])
    ]
    program = (
        f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_scores_loads_neither_a_compiler_nor_a_learner() -> None:
    """They would take half of the start of every search."""
    program = (
        "import sys, bsnas.engine.evaluation.trained_run, bsnas.search.runs.search_run\n"
        "print([name for name in ('torch._dynamo', 'sklearn', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_search_that_cannot_be_loads_no_torch(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run", preset("digits"))
    words = [str(ROOT / "search/evolve.py"), "--run", str(tmp_path / "run"), "--max-macs", "1"]
    program = (
        f"import runpy, sys\nsys.argv = {words}\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (2, "False"), done.stderr
    assert "no architecture has macs <= 1; reachable" in done.stderr


def test_the_map_of_the_readme_names_every_folder() -> None:
    named: dict[str, list[str]] = {}
    for package, folder in re.findall(r"^(?:(\w+)/|  (\w+)/) ", (ROOT / "README.md").read_text(), flags=re.M):
        named[package or list(named)[-1]] = named.get(package or list(named)[-1], []) + ([folder] if folder else [])
    for package, order in ORDER.items():
        assert set(named[package]) == {name for name in order if (ROOT / package / name).is_dir()}
