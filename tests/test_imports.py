"""Imports run one way: kernels <- engine <- search <- benchmarks <- tests; the space and the costs need no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("kernels", "engine", "search", "benchmarks", "tests")
NO_TORCH = ("errors", "launcher", "preemption", "space", "cost", "sampling", "shrink")
ALLOWED_WITHOUT_TORCH = {f"engine.{name}" for name in NO_TORCH} | {"engine"}


def imported_modules(file: Path) -> set[str]:
    """Every module that the file imports anywhere, function bodies included, by its full name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            names.add(node.module)
    return names


def sources(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_no_layer_imports_a_later_one(layer):
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert sources(layer), f"no files under {layer}/"
    wrong = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sources(layer)
        for name in imported_modules(file)
        if name.split(".")[0] in later
    }
    assert not wrong


@pytest.mark.parametrize("name", NO_TORCH)
def test_space_and_costs_import_only_the_standard_library_and_one_another(name):
    names = imported_modules(ROOT / "engine" / f"{name}.py")
    foreign = {n for n in names if n.split(".")[0] not in sys.stdlib_module_names and n not in ALLOWED_WITHOUT_TORCH}
    assert not foreign


def test_costs_are_computed_without_torch_being_loaded():
    program = (
        "import sys; import bsnas.engine.space.cost, bsnas.engine.space.sampling, bsnas.engine.space.shrink, bsnas.engine.space.space as s; "
        "space = s.Space(clusters=(s.Cluster(blocks=1, kernels=(3,), expansions=(2,), channels=(8,), stride=1),)); "
        "arch = bsnas.engine.space.sampling.fair_round(space, 0, 0)[0]; assert bsnas.engine.space.cost.CostModel(space).macs(arch) > 0; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
