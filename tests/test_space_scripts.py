"""Spaces at the command line: --space and --show-space, search/space.py, and the comparison with public tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bsnas.benchmarks.parts.tabular.public_table import CodeReader, PublicTable
from bsnas.engine.config import ShrinkConfig
from bsnas.engine.host.errors import UserError
from bsnas.engine.presets import preset, with_space
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.families import FAMILIES
from bsnas.engine.space.space import Space
from bsnas.engine.space.space_file import parse_space, space_text
from bsnas.engine.space.spaces import space_named
from bsnas.search.space import SpaceArguments, duration
from tests import script
from tests.engine.test_families import family_space


def test_a_space_that_is_shown_can_be_given_back(tmp_path):
    shown = script("engine/train.py", "--space", "nas-bench-macro", "--show-space", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert parse_space(shown.stdout, "shown") == space_named("nas-bench-macro")
    (tmp_path / "mine.toml").write_text(shown.stdout.replace("operations", "opreations", 1))
    refused = script("engine/train.py", "--space", "mine.toml", "--run", "run", cwd=tmp_path)
    assert refused.returncode == 2
    line = next(n for n, text in enumerate(shown.stdout.splitlines(), start=1) if text.startswith("operations"))
    assert refused.stderr.startswith(f"error: mine.toml:{line}: key opreations is unknown; allowed are ")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_images_follow_a_space_and_a_space_the_images_that_are_given():
    config = with_space(preset("digits"), space_named("nas-bench-macro"))
    assert (config.data.resolution, config.space.resolution, config.data.channels) == (32, 32, 3)
    gray = with_space(preset("digits"), replace(space_named("digits"), input_channels=1))
    assert (gray.data.channels, len(gray.data.mean)) == (1, 1)


@pytest.mark.slow
def test_a_space_is_described_without_training(tmp_path):
    told = script(
        "search/space.py", "nas-bench-macro", "--samples", "50", "--images", "1000", "--picture", "space.svg",
        "--json", "space.json", cwd=tmp_path,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    figures = json.loads((tmp_path / "space.json").read_text())
    assert figures["architectures"] == "6561"
    assert figures["multiply-adds"] == [7713280, 105660928]
    assert figures["supernet_parameters"] > 2_000_000
    assert figures["training_seconds"] > 0
    assert "6,561; a round of fair sampling has 3 paths" in told.stdout
    assert (tmp_path / "space.svg").read_text().startswith("<?xml")
    refused = script("search/space.py", "other", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: space other cannot be read")
    blocked = script("search/space.py", "digits", "--skip-time", "--picture", "no/such/space.png", cwd=tmp_path)
    assert blocked.returncode == 2
    line = "error: picture no/such/space.png cannot be written: No such file or directory; choose another --picture\n"
    assert blocked.stderr == line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture": Path("space.pdf")}, r"picture space.pdf; give a file name that ends in .svg or .png"),
        ({"samples": 0}, "samples 0, images 50000: each must be at least 1"),
    ],
)
def test_arguments_that_describe_no_space(changes, message):
    with pytest.raises(UserError, match=message):
        SpaceArguments(file="digits", **changes)


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (40, 1800, 19080, 3e5)] == ["40 s", "30 min", "5.3 h", "3.5 days"]


# ---- public tables


def small_table(name: str, every: int = 97) -> dict[str, dict[str, int]]:
    space = space_named(name)
    reader, costs, rows = CodeReader(space), CostModel(space), {}
    digits, length = ("012", 8) if name == "nas-bench-macro" else ("1234", 7)
    number = len(digits) ** length
    for index in sorted({*range(0, number, every), number - 1}):
        code = ""
        for _ in range(length):
            index, digit = divmod(index, len(digits))
            code += digits[digit]
        macs, params = costs.macs_and_params(reader.arch(code, int(digits[0])))
        rows[code] = {"flops": macs, "params": params}
    return rows


@pytest.mark.parametrize("name", ["nas-bench-macro", "channel-bench-mobilenet", "channel-bench-resnet"])
def test_a_table_is_recognised_and_compared(name, tmp_path):
    rows = small_table(name)
    (tmp_path / "table.json").write_text(json.dumps(rows))
    table = PublicTable.read(tmp_path / "table.json")
    assert table.name == name
    assert not list(table.mismatches())


def test_a_wrong_row_is_counted_and_named(tmp_path):
    rows = small_table("nas-bench-macro")
    wrong = list(rows)[3]
    rows[wrong]["params"] += 1
    (tmp_path / "table.json").write_text(json.dumps(rows))
    done = script(
        "benchmarks/tabular.py", "--table", "table.json", "--check-costs", "--json", "out.json", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 1
    assert f"{wrong}: " in done.stdout
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["rows"], figures["mismatches"]) == (len(rows), 1)
    nothing = script("benchmarks/tabular.py", "--table", "table.json", cwd=tmp_path)
    assert nothing.returncode == 2
    assert nothing.stderr == "error: nothing was asked for; give --check-costs, or --run with a trained supernet\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r'is no public table; give a JSON file of entries as "0121": '),
        ("[]", "is no public table"),
        ("{}", "is no public table"),
        ('{"012": {"flops": 1.5, "params": 3}}', "is no public table"),
        ('{"012": {"flops": 1, "params": 3}}', "is a table of 1 codes as 012, which no space of the package has; give"),
        ('{"0a2": {"flops": 1, "params": 3}, "": {"flops": 1, "params": 3}}', "which no space of the package has"),
    ],
)
def test_files_that_are_no_table(content, message, tmp_path):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UserError, match=message):
        PublicTable.read(tmp_path / "table.json")
    with pytest.raises(UserError, match=r"table .* cannot be read: No such file or directory; give a public table's"):
        PublicTable.read(tmp_path / "none.json")


# ---- settings and files


def test_a_step_compares_thirds_inside_a_budget():
    assert ShrinkConfig(models_per_operation=20, models_most=100).models(28) == 100
    assert ShrinkConfig(models_per_operation=20).models(28) == 560
    with pytest.raises(UserError, match="models most 2: a step compares thirds; give at least 3, or none"):
        ShrinkConfig(models_most=2)
    with pytest.raises(UserError, match=r"macs from 40M to 10M is empty"):
        ShrinkConfig(macs=("40M", "10M"))
    with pytest.raises(UserError, match="'many' is not a count"):
        ShrinkConfig(macs=("1M", "many"))
    config = preset("digits")
    with pytest.raises(UserError, match=r"no architecture has .*; reachable in this space: macs"):
        replace(config, shrink=replace(config.shrink, macs=("40G", "50G")))


def test_json_with_other_entries_is_no_space():
    data = family_space("ir").to_json()
    data["table"][1]["colour"] = 3
    with pytest.raises(UserError, match=r"an entry has .*colour where channels and rows belong; give a file that"):
        Space.from_json(data)
    assert space_text(family_space("ir")).count("[[cluster.row]]") == 2


# ---- every family from training to serving


MIXED = """\
resolution = 16
springs = "sliced"

[[cluster]]
channels = [8, 12]

[[cluster.row]]
family = "conv"
stride = 2
kernels = [1, 3]
activations = ["relu", "relu6"]

[[cluster.row]]
family = "separable"
kernels = [3, 5]
identity = true

[[cluster.row]]
family = "ir"
expansions = [1, 3]

[[cluster]]
channels = [16, 24]

[[cluster.row]]
family = "basic"
stride = 2
widths = [12, 16]

[[cluster.row]]
family = "bottleneck"
expansions = [1, 2]
identity = true
"""


@pytest.mark.slow
def test_a_space_of_all_families_goes_from_training_to_serving(tmp_path):
    (tmp_path / "mixed.toml").write_text(MIXED)
    assert {row.family for c in parse_space(MIXED, "mixed").table for row in c.rows} == set(FAMILIES)
    schedule = ["--optimizer.warmup-epochs", "0", "--shrink.first-epochs", "2", "--shrink.interval-epochs", "1"]
    steps = ["--shrink.keep", "4", "--shrink.models-per-operation", "2", "--data.cache-dir", str(tmp_path / "cache")]
    run = ("--run", "run")
    commands = [
        ("engine/train.py", "--space", "mixed.toml", *schedule, *steps, *run),
        ("search/evolve.py", *run, "--population", "6", "--iterations", "1"),
        ("engine/retrain.py", *run, "--epochs", "2"),
        ("engine/export.py", *run),
        ("search/report.py", *run),
        ("benchmarks/serve_check.py", *run, "--limit", "20"),
    ]
    for name, *arguments in commands:
        done = script(name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr[-500:]}"
    assert "top-1" in done.stdout
