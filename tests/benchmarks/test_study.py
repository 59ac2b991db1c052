"""The study: its table of cells, its baselines, its statistics, and a whole tiny one that is repeated."""

import fcntl
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bsnas.benchmarks import study as study_script
from bsnas.benchmarks.parts.study import baselines as study_baselines
from bsnas.benchmarks.parts.study.baselines import Plain, count_macs, largest_arch, mobilenet_v2_of, prune
from bsnas.benchmarks.parts.study.cells import CELLS, base_config, fixed_channels
from bsnas.benchmarks.parts.study.tables import BEGIN, END, fill_page, network_table, supernet_table, write_tables
from bsnas.benchmarks.parts.study.trained_alone import TrainedAlone
from bsnas.benchmarks.study import NAMES, Study, StudyArguments
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from tests.engine.training.cases import tiny_config, tiny_space


@pytest.mark.parametrize("preset", ["digits", "fashion-mnist", "fashion-mnist-wide"])
def test_all_cells_make_equally_many_passes_and_differ_from_the_base(preset):
    base = base_config(preset, None, None)
    configs = {cell.name: cell.config(base, seed=2) for cell in CELLS}
    assert {config.shrink.total_epochs for config in configs.values()} == {base.shrink.total_epochs}
    assert {config.seed for config in configs.values()} == {2}
    assert configs["base"] == replace(base, seed=2)
    assert len({str(config) for config in configs.values()}) == len(CELLS)
    assert configs["shrinking"].shrink.step_epochs == (base.shrink.total_epochs // 2, base.shrink.total_epochs * 3 // 4)


@pytest.mark.parametrize("preset", ["fashion-mnist", "fashion-mnist-wide"])
def test_the_fashion_mnist_spaces_search_five_clusters_in_all_three_dimensions(preset):
    space = base_config(preset, None, None).space
    assert space.resolution == 32
    assert len(space.clusters) == 5
    rows = [row for cluster in space.clusters for row in cluster.rows]
    assert all(len(row.kernels) == 3 and len(row.expansions) == 2 for row in rows)
    assert all(len(cluster.channels) == 3 for cluster in space.clusters)


def test_fixed_channels_are_the_middle_ones():
    space = fixed_channels(space_named("digits"))
    assert [c.channels for c in space.clusters] == [(20,), (32,), (48,), (64,)]
    assert space.max_live == 6


def test_the_scaled_mobilenet_v2_is_as_wide_as_the_limit_allows():
    limit = 3_000_000
    space, arch = mobilenet_v2_of(space_named("digits"), limit)
    assert CostModel(space).macs_and_params(arch)[0] <= limit
    _, wider_arch = mobilenet_v2_of(space_named("digits"), 2 * limit)
    assert all(a > b for a, b in zip(wider_arch.channels, arch.channels, strict=True))
    assert {(op.kernel, op.expansion) for op in arch.flat_blocks} == {(3, 6)}
    with pytest.raises(UserError, match=r"no MobileNetV2 of this depth has at most 1000 MACs; raise --max-macs"):
        mobilenet_v2_of(space_named("digits"), 1000)


def test_pruning_reaches_the_limit_and_the_plain_network_computes_the_same():
    torch.manual_seed(0)
    space = tiny_space()
    network = Subnet(space, largest_arch(space)).eval()
    example = torch.randn(2, 3, 16, 16)
    whole = count_macs(network, example[:1])
    assert whole == CostModel(space).macs_and_params(network.arch)[0]
    torch.testing.assert_close(Plain(network)(example), network(example))
    macs = prune(network, 0.6 * whole)
    assert 0.3 * whole < macs <= 0.6 * whole
    assert macs == count_macs(network, example[:1])
    plain = Plain(network).train()
    plain(example).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())
    with pytest.raises(UserError, match=r"pruning ends at \d+ MACs, above the limit of 10; raise --max-macs"):
        prune(network, 10)


def test_without_torch_pruning_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(study_baselines, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"this part needs Torch-Pruning; pip install torch-pruning"):
        prune(Subnet(tiny_space(), largest_arch(tiny_space())), 10)


def _part(top1: float, tau: float | None = None) -> dict:
    agree = {"kendall_tau": tau, "kendall_tau_interval": [0, 1]}
    ranking = dict.fromkeys(("running", "recalibrate"), agree) if tau is not None else {}
    return {
        "random_top1": {"running": [0.1], "recalibrate": [top1]}, "ranking": ranking,
        "best": {"top1": top1, "macs": 2e6}, "retrained_top1": top1, "training_s": 90, "probes": [],
        "pool": {
            "seeds_agree": {"kendall_tau": 0.5, "kendall_tau_interval": [0.1, 0.8]},
            "macs_agree": {"kendall_tau": 0.25, "kendall_tau_interval": [0, 0.5]},
            "top1_by_seed": [],
        },
        "pool_one_shot": {},
    }  # fmt: skip


def _figures() -> dict:
    return {
        "request": {"max_macs": 2e6, "base": {"shrink": {"first_epochs": 4}, "retrain": {"epochs": 2}}},
        "commit": "abc", "date": "2026-01-02T03:04:05",
        "cells": {
            "base": {"about": "the base", "seeds": {0: _part(0.5, 0.4), 1: _part(0.6, 0.6)}},
            "shrinking": {"about": "shrunk", "seeds": {0: _part(0.7), 1: _part(0.9)}},
        },
        "baselines": {"random": {"about": "random", "seeds": {0: {"macs": 1e6, "test_top1": 0.6}}}},
    }  # fmt: skip


def test_tables_hold_means_and_paired_intervals():
    base, shrunk = supernet_table(_figures()).splitlines()[2:]
    assert base.startswith("| the base | 2 | 0.550 | 0.100 | 0.500 | 0.500 | 0.550 | 0.550 | 1.5 |")
    # differences 0.2 and 0.3: mean 0.25, and Student's t of one degree of freedom, 12.706, times 0.05
    assert "| 0.800 (+0.250 ± 0.635) | 0.100 (+0.000 ± 0.000) | none | none |" in shrunk
    first, full, random = network_table(_figures()).splitlines()[2:]
    assert first.endswith("| 2.00 M | 0.8000 | 0.7000 to 0.9000 |  |")
    assert full.endswith("| -0.250 ± 0.635 |")
    assert random.endswith("| 1 | 1.00 M | 0.6000 | 0.6000 to 0.6000 | -0.100 |")


def test_a_page_is_filled_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_tables(_figures(), tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Commit abc, 2026-01-02. Limit 2.00 M MACs" in text
    assert "different seeds agree with tau 0.50 (0.10 to 0.80)" in text
    assert "Tau of the base, a seed each: 0.40 (0.00 to 1.00), 0.60 (0.00 to 1.00)." in text
    assert "MACs rank them with tau 0.25 (0.00 to 0.50)" in text
    assert (tmp_path / "networks.svg").is_file()
    assert len((tmp_path / "supernets.csv").read_text().splitlines()) == 5
    page.write_text("nothing")
    with pytest.raises(UserError, match=r"page.md has no lines .* for the tables to stand between; add them"):
        fill_page(page, "x")


@pytest.mark.slow
def test_a_whole_study_is_done_once_and_other_options_are_refused(alone, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "cache")
    config = replace(config, shrink=replace(config.shrink, first_epochs=4, keep=()))
    monkeypatch.setattr(study_script, "base_config", lambda *_: config)
    chosen = ("base", "shrinking", "fixed-channels", "random-search", "mobilenet-v2", "torch-pruning")
    arguments = StudyArguments(
        output=tmp_path / "study",
        preset="digits",
        cells=chosen,
        seeds=1,
        archs=3,
        pool_seeds=2,
        population=6,
        iterations=1,
    )
    study = Study(arguments, alone)
    study.run()
    results = study.results()
    base, shrunk = (results["cells"][name]["seeds"][0] for name in ("base", "shrinking"))
    assert len(base["random_top1"]["running"]) == 20
    first, second = base["pool"]["top1_by_seed"]
    assert len(first) == len(second) == len(base["pool"]["archs"]) == 3
    assert first != second
    assert -1 <= base["ranking"]["recalibrate"]["kendall_tau"] <= 1
    assert shrunk["probes"][-1]["when"] == "final"
    assert 0.1 < base["retrained_top1"] <= 1
    networks = {name: part["seeds"] for name, part in results["baselines"].items()}
    assert networks["random-network"] == {}
    for name in ("random-search", "mobilenet-v2", "torch-pruning"):
        assert networks[name][0]["macs"] <= study.max_macs

    monkeypatch.setattr(study_script, "SupernetTraining", None)  # nothing is trained again
    Study(arguments, alone).run()
    assert Study(arguments, alone).results() == results
    with pytest.raises(UserError, match=r"holds a study with another evolution; give the same options"):
        Study(replace(arguments, population=9), alone).run()
    with pytest.raises(UserError, match=r"base.seed-1 is not there, which this part needs; add base to --cells"):
        Study(replace(arguments, cells=("random-search",), seeds=2), alone).run()
    (tmp_path / "study" / "results" / "base-0.json").unlink()
    run_config = Path(tmp_path / "study" / "base" / "seed-0" / "config.json")
    run_config.write_text(run_config.read_text().replace('"seed": 0', '"seed": 5'))
    with pytest.raises(UserError, match=r"holds a run with another configuration; give another --output"):
        Study(arguments, alone).run()


def test_networks_in_training_elsewhere_come_last(alone, tmp_path, monkeypatch):
    config, trained = tiny_config(tmp_path / "cache"), []
    pool = TrainedAlone(tmp_path, config, alone, open_dataset(config.data))

    def train(self, network, request, directory):
        trained.append(network.arch)
        busy.close()  # the other process ends meanwhile
        return 0.5

    monkeypatch.setattr(TrainedAlone, "train", train)
    first, second = (uniform_arch(config.space, random.Random(seed)) for seed in range(2))
    directory = pool.entry(config.space, first)[0]
    directory.mkdir()
    with open(directory / "lock", "a") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        assert pool.all_top1(config.space, [first, second]) == (0.5, 0.5)
    assert trained == [second, first]


def test_unknown_cells_and_empty_numbers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"cells basis are unknown; allowed are base, shrinking"):
        StudyArguments(output=tmp_path, cells=("basis",))
    with pytest.raises(UserError, match=r"seeds 0, .*: need at least 1 seed, 4 epochs, 1 retrain epoch"):
        StudyArguments(output=tmp_path, seeds=0)
    with pytest.raises(UserError, match=r"pool seeds 0; need at least 1"):
        StudyArguments(output=tmp_path, pool_seeds=0)
    assert set(NAMES) >= {cell.name for cell in CELLS}
