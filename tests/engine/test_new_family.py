"""The family that docs/extending.md adds works as it stands there, with every axis."""

import re
import types

import pytest

from bsnas.engine.space.families import FAMILIES
from bsnas.engine.space.space_file import parse_space
from tests import ROOT
from tests.engine import test_families

PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """The page's file as a module, and its entry."""
    (code,) = re.findall(r"```python\n# fused\.py\n(.*?)```", PAGE, flags=re.S)
    module = types.ModuleType("fused")
    exec(code, module.__dict__)
    monkeypatch.setitem(FAMILIES, module.FAMILY.name, module.FAMILY)


def test_a_file_of_the_new_family_is_read():
    text = 'resolution = 8\n[[cluster]]\nchannels = [8, 12]\nfamily = "fused"\nblocks = 2\nexpansions = [1, 4]\n'
    space = parse_space(text, "fused.toml")
    assert space.num_architectures == 2 * 2**2
    assert [plan.hidden for plan in space.released_plans(test_families.archs_of(space, 1)[0])] != [0, 0]


@pytest.mark.parametrize("springs", ["fixed", "sliced"])
def test_it_runs_scores_and_is_released_as_the_others(springs):
    test_families.test_a_path_computes_its_plans_and_gives_gradients_to_what_it_uses("fused", springs, "nested")
    test_families.test_folded_scores_are_those_of_a_loop("fused", springs)
    test_families.test_recalibrated_scores_are_those_of_networks_recalibrated_alone("fused", springs)
    test_families.test_the_release_equals_the_path_in_value_and_gradient("fused", springs, True)
    test_families.test_peak_memory_is_what_layers_hold("fused", springs)


def test_it_has_latency_parts_and_onnx_files(tmp_path):
    test_families.test_latency_parts_are_the_blocks_of_released_networks("fused")
    test_families.test_onnx_answers_like_torch_in_fp32_and_int8("fused", tmp_path)
