"""The ranking study: its statistics, its pool, and a whole small study that is interrupted."""

import pytest

from bsnas.benchmarks.parts.study import trained_alone
from bsnas.benchmarks.parts.study.agreement import agreement
from bsnas.benchmarks.ranking import RankingArguments, stratified, study
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import fair_archs
from tests.engine.training.cases import make_trainer, tiny_config, tiny_space


def test_statistics_of_a_case_worked_out_by_hand():
    found = agreement([0.1, 0.2, 0.3, 0.4], [0.5, 0.7, 0.6, 0.8], resamples=200)
    assert found["kendall_tau"] == pytest.approx(4 / 6)  # five of six pairs agree, one does not
    assert found["spearman"] == pytest.approx(0.8)
    assert found["pearson"] == pytest.approx(0.8)
    assert found["gap"] == pytest.approx(0.4)
    low, high = found["kendall_tau_interval"]
    assert -1 <= low < 4 / 6 < high <= 1


def test_ties_count_in_tau_and_equal_values_have_none():
    assert agreement([1, 1, 2], [1, 2, 3], resamples=10)["kendall_tau"] == pytest.approx(2 / 6**0.5)
    found = agreement([1, 1, 1], [1, 2, 3], resamples=10)
    assert found["kendall_tau"] is found["pearson"] is found["kendall_tau_interval"] is None
    assert found["gap"] == 1


def test_intervals_narrow_with_more_networks_and_hold_the_truth_of_a_noisy_line():
    widths = []
    for count in (12, 200):
        x = [i / count for i in range(count)]
        y = [value + 0.05 * (-1) ** i for i, value in enumerate(x)]
        low, high = agreement(x, y, resamples=300)["pearson_interval"]
        assert low < agreement(x, y, resamples=1)["pearson"] < high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_a_pool_covers_accuracy_and_macs():
    archs = list(dict.fromkeys(fair_archs(tiny_space(), 0, 60)))[:40]
    accuracy = {arch: (7 * i % 40) / 40 for i, arch in enumerate(archs)}
    macs = CostModel(tiny_space()).macs_and_params
    pool = stratified(archs, accuracy.__getitem__, lambda arch: macs(arch)[0], 10)
    assert len(set(pool)) == 10
    quarters = [int(4 * accuracy[arch]) for arch in pool]
    assert [quarters.count(q) for q in range(4)] == [2, 3, 2, 3]
    lowest = [arch for arch in archs if accuracy[arch] < 0.25]
    assert {min(lowest, key=lambda a: macs(a)[0]), max(lowest, key=lambda a: macs(a)[0])} <= set(pool)


def test_a_study_compares_both_accuracies_and_trains_nothing_twice(alone, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "cache")
    run = RunDir.create(tmp_path / "run", config)
    make_trainer(run, config, alone).train()
    arguments = RankingArguments(run=run.path, archs=3, candidates=4, epochs=1, resamples=20, step=0)
    trained, trainer = [], trained_alone.NetworkTraining

    def counted(network, *rest):
        trained.append(network.arch)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return trainer(network, *rest)

    monkeypatch.setattr(trained_alone, "NetworkTraining", counted)
    with pytest.raises(KeyboardInterrupt):
        study(run, arguments, alone)
    figures = study(run, arguments, alone)
    assert len(trained) == 4
    assert trained[2] == trained[3]
    assert [row["checkpoint"] for row in figures["checkpoints"]] == ["before step 1"]
    assert len(figures["archs"]) == 3
    for row in figures["archs"]:
        assert 0 <= row["one_shot"] <= 1
        assert 0.1 < row["stand_alone"] <= 1
    assert study(run, arguments, alone)["archs"] == figures["archs"]
    assert len(trained) == 4


def test_a_step_that_was_not_made_is_refused(alone, tmp_path):
    run = RunDir.create(tmp_path / "run", tiny_config(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"step 1; .* has made 0 shrink steps: give 0 to that number"):
        study(run, RankingArguments(run=run.path, step=1), alone)


def test_too_few_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"archs 2, .*: need at least 3 archs"):
        RankingArguments(run=tmp_path, archs=2)
