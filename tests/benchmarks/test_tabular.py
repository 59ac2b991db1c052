"""Ranking the networks of a public table: the statistics, the halves, and a run of the table's space."""

import csv
import itertools
import json
import shlex
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from bsnas.benchmarks.parts.tabular import trained_finals
from bsnas.benchmarks.parts.tabular.corrected import corrected
from bsnas.benchmarks.parts.tabular.finals import finals
from bsnas.benchmarks.parts.tabular.public_table import CodeReader, PublicTable, Row, row_of
from bsnas.benchmarks.parts.tabular.ranking import against_the_best, ceilings, in_half, ranking, tau_in_bands
from bsnas.benchmarks.parts.tabular.scored_run import check_run, search_budgets
from bsnas.benchmarks.parts.tabular.worth import worth
from bsnas.benchmarks.parts.timing.turns import append_rows
from bsnas.benchmarks.tabular import TabularArguments
from bsnas.engine.evaluation.evaluator import Score
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.commands import recorded
from bsnas.engine.space.arch import Operation
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.space.spaces import space_named
from bsnas.search.algorithms.evolution import EvolutionConfig
from bsnas.search.runs.history import LatestSearch
from tests import script
from tests.search.runs import untrained_run


def rows_of(accuracies, macs):
    return [Row(f"{i}", int(m), 1000 + i, (a,)) for i, (a, m) in enumerate(zip(accuracies, macs, strict=True))]


def test_tau_in_bands_counts_the_pairs_inside_bands_only():
    macs = np.array([38.1e6, 40e6, 41.9e6, 60e6, 61e6, 62e6, 62.5e6, 50e6, 100e6])
    accuracies = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9])
    scores = np.array([3.0, 2, 1, 1, 2, 3, 4, -5, -9])
    # 3 pairs at 40 M, all wrong; 6 pairs at 60 M, all right; none elsewhere.
    assert tau_in_bands(scores, accuracies, macs) == pytest.approx((-3 + 6) / 9)
    assert tau_in_bands(scores, accuracies, np.full(9, 100e6)) == 0


def test_a_ranking_has_its_interval_around_it():
    rng = np.random.default_rng(1)
    accuracies, macs = rng.normal(90, 1, 80), rng.uniform(37e6, 83e6, 80)
    scores = accuracies + rng.normal(0, 1, 80)
    found = ranking(rows_of(accuracies, macs), scores, name="x")
    assert found["tau_x"] == pytest.approx(kendalltau(scores, accuracies).statistic)
    assert found.keys() == {
        f"{key}{end}" for key in ("tau_x", "spearman_x", "tau_x_bands") for end in ("", "_interval")
    }
    for key in ("tau_x", "spearman_x", "tau_x_bands"):
        low, high = found[f"{key}_interval"]
        assert low < found[key] < high


def test_no_score_passes_the_ceiling_of_noisy_trainings():
    rng = np.random.default_rng(2)
    true = rng.normal(90, 1, 4000)
    trainings = true[:, None] + rng.normal(0, 1, (4000, 3))
    rows = [Row(f"{i}", 60_000_000, 1, tuple(values)) for i, values in enumerate(trainings)]
    ceiling = ceilings(rows)
    perfect = kendalltau(true, trainings.mean(1)).statistic
    assert ceiling["ceiling"] == pytest.approx(perfect, abs=0.02)
    assert ceiling["ceiling_bands"] == pytest.approx(perfect, abs=0.02)


def test_what_is_found_stands_beside_random_searches():
    rows = rows_of([90.0, 91, 92, 93, 99], [50e6, 50e6, 60e6, 60e6, 61e6])
    result = against_the_best(rows, rows[1], 60)
    assert (result["regret"], result["rank"], result["networks"]) == (2.0, 3, 4)  # the one of 61 M is outside
    assert result["random"][1] == pytest.approx(1.5, abs=0.03)
    assert result["random"][10] == pytest.approx(sum((k / 4) ** 10 for k in (1, 2, 3)), abs=0.02)


def test_the_halves_are_by_the_crc_of_codes():
    rows = rows_of(range(100), range(100))
    chosen = [row for row in rows if in_half(row, "choose")]
    assert [row for row in rows if in_half(row, "report")] == [row for row in rows if row not in chosen]
    assert all(zlib.crc32(row.code.encode()) % 2 == 0 for row in chosen)
    assert 30 < len(chosen) < 70
    assert all(in_half(row, None) for row in rows)


def small_table(path):
    """Some rows of NAS-Bench-Macro's space with accuracies made up, among them all digits at every place."""
    space = space_named("nas-bench-macro")
    reader, costs = CodeReader(space), CostModel(space)
    codes = [*map("".join, itertools.product("012", repeat=8))][::401]
    codes += ["22222222", "22201222", "22210222"]  # the last two are one network: an identity moves inside its stage
    rows = {}
    for i, code in enumerate(codes):
        macs, params = costs.macs_and_params(reader.arch(code, 0))
        rows[code] = {"flops": macs, "params": params, "test_acc": [80 + i % 13, 81 + i % 13, 80 + i % 11]}
    path.write_text(json.dumps(rows))
    return path


def test_equal_networks_are_one(tmp_path):
    table = PublicTable.read(small_table(tmp_path / "table.json"))
    distinct = table.distinct
    assert len(distinct) == len(table.rows) - 1
    assert {"22201222", "22210222"} & {row.code for row in distinct.values()} == {"22210222"}
    macs = CostModel(table.space).macs
    assert all(macs(arch) == row.macs for arch, row in distinct.items())


@pytest.mark.slow
def test_a_run_ranks_a_table(tmp_path):
    small_table(tmp_path / "table.json")
    trained = untrained_run(tmp_path / "run", space_named("nas-bench-macro"))
    with recorded(trained, "train"):
        pass
    command = (
        "benchmarks/tabular.py", "--table", "table.json", "--run", "run", "--bn", "running", "--population", "3",
        "--iterations", "1",
    )  # fmt: skip
    done = script(
        *command, "--corrections", "12", "--scores", "scores.csv", "--rows", "rows.csv", "--method", "plain",
        "--json", "out.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    table = PublicTable.read(tmp_path / "table.json")
    assert figures["networks"] == len(table.distinct)
    scores = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["code"] for row in scores] == [row.code for row in table.distinct.values()]
    accuracy = {row.code: row.accuracy for row in table.rows}
    expected = kendalltau([float(row["top1"]) for row in scores], [accuracy[row["code"]] for row in scores]).statistic
    assert figures["tau"] == pytest.approx(expected)
    (learned,) = figures["corrections"]
    assert learned["trained"] == 12
    assert learned["tau_range"][0] <= learned["tau"] <= learned["tau_range"][1] <= 1
    assert " 12 trained" in done.stdout
    line, corrected_line = csv.DictReader((tmp_path / "rows.csv").open())
    assert corrected_line["method"] == "plain, corrected by 12 trainings"
    assert float(corrected_line["tau"]) == pytest.approx(learned["tau"], abs=1e-4)
    assert (line["table"], line["half"], line["method"], line["seed"]) == ("nas-bench-macro", "all", "plain", "0")
    assert line["command"] == shlex.join(sys.argv)
    assert float(line["minutes"]) == 0

    few = script(*command, "--corrections", "5", cwd=tmp_path)
    assert few.returncode == 2
    assert "corrections from 5 networks; give numbers from 10 to less than the" in few.stderr
    half = script(*command, "--half", "report", "--json", "half.json", cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    assert 0 < json.loads((tmp_path / "half.json").read_text())["networks"] < figures["networks"]

    costs = {code: {**row, "test_acc": []} for code, row in json.loads((tmp_path / "table.json").read_text()).items()}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    refused = script("benchmarks/tabular.py", "--table", "costs.json", "--run", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert (
        "has networks without accuracies, so nothing to rank by; give one whose entries have test_acc" in refused.stderr
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing was asked for; give --check-costs, or --run with a trained supernet"),
        ({"check_costs": True, "half": "choose"}, "are about the scores of a run; give --run, or leave them out"),
        ({"run": Path("run"), "rows": Path("rows.csv")}, "--rows and --method belong together; give both or neither"),
        ({"check_costs": True, "iterations": 3}, "and --images are about the scores of a run"),
        ({"run": Path("run"), "train_finals": (50, 60)}, "--train-finals 50 60; give some of 40, 60, 80"),
        ({"run": Path("run"), "passes": 0}, "--passes 0; give at least 1"),
        (
            {"run": Path("run"), "images": Path("x"), "method": "plain"},
            r"--images with --method plain; allowed are fair\|calr\|sandwich\|alpha-channels\|nested-decay\|free-crop",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        TabularArguments(table=Path("table.json"), **options)


@pytest.mark.parametrize("others", [6, 0])
def test_own_finals_are_judged_by_the_table(tmp_path, monkeypatch, others):
    """The winner by its row, the correction by networks that were not trained; epochs are those of all trainings.

    Eight networks are too few to learn from.
    """
    table = PublicTable.read(small_table(tmp_path / "table.json"))
    untrained_run(tmp_path / "run", space_named("nas-bench-macro"))
    trained = TrainedRun.open(tmp_path / "run", Process.current(torch.device("cpu")))
    networks = dict(sorted(table.distinct.items(), key=lambda pair: -pair[1].macs))
    archs, rows = list(networks), list(networks.values())
    scores = [Score(0.5, 0.9, float(90 - row.accuracy), 10, 5, 9) for row in rows]
    trainings = [
        {"arch": str(arch), "one_shot_loss": score.loss, "top1": row.accuracy / 100}
        for arch, row, score in zip(archs, rows, scores, strict=True)
    ]
    asked = []

    class Held:
        def __init__(self, trained, config, overrides, search):
            asked.append((config.networks, config.random, search))

        def hold(self):
            rungs = [{"networks": trainings[:count], "epochs": 16 // count} for count in (8, 4, 2)]
            rest = trainings[8 : 8 + others]
            return {"winner": trainings[1], "rungs": rungs, "others": rest, "request": {"decay_epochs": 1}}

    monkeypatch.setattr(trained_finals, "Finals", Held)
    search = LatestSearch({}, [], [])
    held = trained_finals.hold_finals(trained, search)
    found = trained_finals.judged(table.space, held, networks, scores, 200)
    assert asked == [(8, 6, search)]
    assert (found["trained"], found["epochs"]) == (8 + others, 4 * 3 + 2 * 6 + 2 * 11 + others * 3)
    assert (found["code"], found["networks"]) == (rows[1].code, len(rows))
    assert found["regret"] == pytest.approx(max(row.accuracy for row in rows) - rows[1].accuracy)
    assert found["regret_200"] == found["regret"]
    if others == 0:
        assert "tau" not in found
    else:
        assert found["tau"] > 0.5  # the loss tells the accuracy


def test_a_run_of_another_space_is_refused(tmp_path):
    table = PublicTable.read(small_table(tmp_path / "table.json"))
    untrained_run(tmp_path / "run")
    trained = TrainedRun.open(tmp_path / "run", Process.current(torch.device("cpu")))
    with pytest.raises(UserError, match="has another space than nas-bench-macro, or was shrunk; train one with"):
        check_run(trained, table)


def test_a_budget_that_no_network_of_the_space_keeps_is_left_out(tmp_path):
    untrained_run(tmp_path / "run", space_named("channel-bench-resnet"))  # its smallest network has 90 M multiply-adds
    evaluator = TrainedRun.open(tmp_path / "run", Process.current(torch.device("cpu"))).evaluator("running")
    assert search_budgets(evaluator, {}, EvolutionConfig()) == {}


def test_rows_are_appended_below_their_header_only(tmp_path):
    file = tmp_path / "deep" / "rows.csv"
    append_rows(file, [{"a": 1, "b": 2}])
    append_rows(file, [{"a": 3, "b": 4}])
    assert file.read_text().split() == ["a,b", "1,2", "3,4"]
    with pytest.raises(UserError, match=r"rows.csv has the columns a, b, not a, c; give another file"):
        append_rows(file, [{"a": 1, "c": 2}])
    with pytest.raises(UserError, match=r"rows.csv/below: File exists; choose a directory"):
        append_rows(file / "below", [{"a": 1}])
    assert file.read_text().split() == ["a,b", "1,2", "3,4"]


@pytest.mark.parametrize("accuracy", [101, -1, "90", None])
def test_accuracies_that_are_none_make_no_table(accuracy, tmp_path):
    row = {"flops": 1, "params": 1, "test_acc": [90.5, accuracy]}
    with pytest.raises(ValueError, match="accuracies are percent"):
        row_of("0", row)
    (tmp_path / "table.json").write_text(json.dumps({"0": row}))
    with pytest.raises(UserError, match="is no public table"):
        PublicTable.read(tmp_path / "table.json")


def test_a_correction_that_learns_from_many_trainings_finds_what_they_have_in_common(tmp_path):
    table = PublicTable.read(small_table(tmp_path / "table.json"))
    networks = {arch: row._replace(accuracies=(100 - row.macs / 2e6,)) for arch, row in table.distinct.items()}
    scores = [Score(0.5, 0.9, 1.0, 10, 5, 9) for _ in networks]
    many = corrected(table.space, networks, scores, len(networks) - 4)
    assert many["tau"] > 0.5
    assert many["regret_80_range"][0] <= many["regret_80"] <= many["regret_80_range"][1]


def test_what_a_choice_is_worth_is_found_where_choices_add_up(tmp_path):
    table = PublicTable.read(small_table(tmp_path / "table.json"))
    gains = {op: number / 10 for number, op in enumerate(sorted({op for ops in table.space.live for op in ops}))}
    space = table.space
    archs = [arch for index in range(40) for arch in fair_round(space, 0, index)]
    networks = {arch: Row("0", 1, 1, (90 + sum(gains[op] for op in arch.operations),)) for arch in archs}
    rows = worth(space, networks, [0.5] * len(networks))
    assert len(rows) == sum(len(live) - 1 for live in space.live)
    for row in rows:
        first = space.live[row["block"] - 1][0]
        assert row["table"] == pytest.approx(gains[Operation.parse(row["choice"])] - gains[first])
        assert row["score"] == pytest.approx(0, abs=1e-9)


def test_finals_find_the_best_by_a_good_score_and_learn_where_a_bad_one_errs():
    space = space_named("nas-bench-macro")
    macs = CostModel(space).macs
    archs = list(dict.fromkeys(arch for index in range(200) for arch in fair_round(space, 0, index)))
    networks = {a: Row("0", int(macs(a)), 1, (90 + macs(a) / 1e8 + n % 7 / 100,)) for n, a in enumerate(archs)}
    scores = [Score(0.5, 0.9, 1.0, 10, 5, 9) for _ in networks]
    good = finals(space, networks, scores, [row.accuracy for row in networks.values()])
    assert [row["trained"] for row in good] == [8, 22, 30]
    assert good[0]["regret_80"] == 0
    assert good[0]["random_80"] > 0
    bad = finals(space, networks, scores, [-row.accuracy for row in networks.values()])
    assert bad[0]["regret_80"] > bad[1]["regret_80"] >= bad[2]["regret_80"]
    low, high = bad[1]["regret_80_interval"]
    assert low <= bad[1]["regret_80"] <= high
