"""The finals: who enters, what a rung trains, that nothing is done twice, and what retraining takes of them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bsnas.engine.config import RetrainConfig
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.retrain import RetrainArguments, retrain, winner_of_finals
from bsnas.engine.runs.rundir import NetworkDir, read_json, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limits import Limit
from bsnas.engine.training.network import RungTraining, measure_accuracy
from bsnas.search.algorithms.correction import Correction
from bsnas.search.algorithms.evolution import EvolutionConfig
from bsnas.search.runs.finals import Finals, FinalsConfig
from bsnas.search.runs.history import LatestSearch
from bsnas.search.runs.search_run import search_run
from bsnas.search.runs.trained_networks import trained_networks
from tests.search.runs import untrained_run

SMALL = FinalsConfig(networks=3, random=2, epochs=1, decay_epochs=1)


def searched_run(path: Path, alone: Process, score: str = "top1") -> TrainedRun:
    run = untrained_run(path)
    config = read_json(run.config_file)
    config["optimizer"]["warmup_epochs"] = 0.5
    config["retrain"] = {"epochs": 4, "learning_rate": 0.1, "batch_size": 256}
    write_json(run.config_file, config)
    trained = TrainedRun.open(path, alone)
    evolution = EvolutionConfig.scaled(population=6, iterations=1, seed=0)
    search_run(trained, (Limit("macs", high=40_000),), evolution, None, score=score)  # type: ignore[arg-type]
    return trained


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory, alone: Process) -> tuple[TrainedRun, dict]:  # type: ignore[type-arg]
    trained = searched_run(tmp_path_factory.mktemp("finals") / "run", alone)
    return trained, Finals(trained, SMALL, {}).hold()


def test_the_better_half_goes_on_until_one_is_left(held):
    trained, found = held
    first, second = found["rungs"]
    assert (first["epochs"], second["epochs"]) == (1, 2)
    assert SMALL.rungs == [(3, 1), (2, 2)]
    for rung in found["rungs"]:
        assert [row["top1"] for row in rung["networks"]] == sorted((r["top1"] for r in rung["networks"]), reverse=True)
    assert {row["arch"] for row in second["networks"]} == {row["arch"] for row in first["networks"][:2]}
    assert found["winner"]["arch"] == second["networks"][0]["arch"]
    assert found["winner"]["epochs"] == 2
    assert read_json(trained.run.finals_file) == found
    entered = {row["arch"] for row in first["networks"]}
    assert read_json(trained.run.best_file)["arch"] in entered
    others = {row["arch"] for row in found["others"]}
    assert len(others) == 2
    assert not others & entered
    networks = trained_networks(trained.run)
    assert {str(network.arch) for network in networks} == entered | others
    rows = {row["arch"]: row for row in (*first["networks"], *found["others"])}
    for network in networks:
        assert network.top1 == rows[str(network.arch)]["top1"]
        assert network.one_shot_loss == rows[str(network.arch)]["one_shot_loss"]


def test_a_rung_scores_what_a_plain_training_with_its_schedule_gives(held, tmp_path, alone):
    """One epoch at a constant rate and one of decay, at a stretch."""
    trained, found = held
    row = found["rungs"][0]["networks"][0]
    torch.manual_seed(trained.config.seed)
    network = Subnet(trained.config.space, Arch.parse(row["arch"]))
    training = RungTraining(
        network, trained.config, tmp_path / "alone", {}, alone, trained.data, {},
        images=trained.data.train, epochs=2, decay_epochs=1,
    )  # fmt: skip
    rates = [training.rate(position) for position in (0.25, 0.5, 1, 1.5, 2)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.05, 0])
    training.train()
    saved = NetworkDir(trained.run.finals / found["winner"]["training"])
    assert saved.checkpoints.is_dir()
    assert not any(saved.path.glob("rung-*/checkpoints"))
    accuracy = measure_accuracy(network, trained.search_val, alone.device)
    assert accuracy.top1 == row["top1"]
    assert accuracy.loss == pytest.approx(row["loss"])


def test_nothing_is_trained_twice_and_killed_finals_end_alike(held, tmp_path, monkeypatch, alone):
    trained, found = held
    monkeypatch.setattr(Finals, "_train", None)
    assert Finals(trained, SMALL, {}).hold() == found
    monkeypatch.undo()
    other = searched_run(tmp_path / "run", alone)
    train, made = Finals._train, []

    def killed(self, *arguments, **settings):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(arguments[0])
        return train(self, *arguments, **settings)

    monkeypatch.setattr(Finals, "_train", killed)
    with pytest.raises(KeyboardInterrupt):
        Finals(other, SMALL, {}).hold()
    monkeypatch.setattr(Finals, "_train", train)
    again = Finals(other, SMALL, {}).hold()
    assert again == found


def test_retraining_goes_on_with_the_winner(held, alone):
    trained, found = held
    winner = winner_of_finals(trained.run)
    assert winner is not None
    assert winner.arch == found["winner"]["arch"]
    with pytest.raises(UserError, match=r"the finals have trained .* for 2 epochs, and its whole training has 2; give"):
        retrain(trained.run, RetrainArguments(run=trained.run.path, epochs=2), alone, {})
    figures = retrain(trained.run, RetrainArguments(run=trained.run.path), alone, {})
    assert (figures["arch"], figures["finals"], figures["epochs"]) == (winner.arch, 2, 4)
    lines = [json.loads(line) for line in trained.run.retrain.metrics_file.read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [3, 4]
    arguments = RetrainArguments(run=trained.run.path, scratch=True, epochs=1, overwrite=True)
    assert "finals" not in retrain(trained.run, arguments, alone, {})


def test_finals_of_another_search_count_no_more(held):
    trained, _ = held
    best = read_json(trained.run.best_file)
    write_json(trained.run.best_file, {**best, "limits": {"macs": "macs <= 50K"}})
    try:
        assert winner_of_finals(trained.run) is None
    finally:
        write_json(trained.run.best_file, best)


@pytest.mark.parametrize("content", [[], {"search": 1}, {"winner": {"arch": "x", "epochs": 1, "training": "../.."}}])
def test_damaged_finals_are_told(held, content):
    trained, found = held
    best = read_json(trained.run.best_file)
    search = {"search": {"arch": best["arch"], "limits": best["limits"]}}
    write_json(trained.run.finals_file, {**search, **content} if content and "winner" in content else content)
    try:
        if content == {"search": 1}:
            assert winner_of_finals(trained.run) is None
        else:
            with pytest.raises(UserError, match="holds no finals of this program; remove it, and repeat"):
                winner_of_finals(trained.run)
    finally:
        write_json(trained.run.finals_file, found)


def test_a_search_by_loss_sends_the_networks_with_the_least_loss(tmp_path, alone):
    trained = searched_run(tmp_path / "run", alone, score="loss")
    losses = [candidate.loss for candidate in Finals(trained, SMALL, {}).entrants]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": 1}, "finals of 1 networks .*need 2 to 32 networks"),
        ({"epochs": 0}, "with 0 epochs"),
        ({"decay_epochs": -1}, "-1 of decay"),
        ({"random": -1}, "-1 random ones"),
    ],
)
def test_finals_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SMALL, **changes)


def test_finals_that_are_longer_than_the_retraining(held):
    trained, _ = held
    with pytest.raises(UserError, match="the last rung ends after 4 epochs at a constant rate, and the winner's whole"):
        Finals(trained, replace(SMALL, epochs=2), {})
    short = replace(trained, config=replace(trained.config, retrain=RetrainConfig(epochs=2)))
    with pytest.raises(UserError, match="give fewer --networks or --epochs"):
        Finals(short, SMALL, {})


def test_a_network_that_is_trained_too_far_is_told(held):
    trained, found = held
    finals = Finals(trained, SMALL, {})
    candidate = next(c for c in finals.entrants if str(c.arch) == found["winner"]["arch"])
    rung = NetworkDir(trained.run.finals / found["winner"]["training"] / "rung-1")
    content = read_json(rung.result_file)
    rung.result_file.unlink()
    try:
        with pytest.raises(UserError, match="is trained 2 epochs already, more than the 1 of its rung; remove"):
            finals._scores(candidate, 1, 1)
    finally:
        write_json(rung.result_file, content)


def test_a_run_without_a_search_says_what_to_do(tmp_path, alone):
    trained = TrainedRun.open(untrained_run(tmp_path / "run").path, alone)
    with pytest.raises(UserError, match=r"holds no search result; run search/evolve.py --run"):
        Finals(trained, SMALL, {})
    write_json(trained.run.best_file, {"arch": "c8", "limits": {}})  # as versions before this one wrote it
    with pytest.raises(
        UserError, match=r"tells of no search of this version \('search'\); repeat search/evolve.py, whi"
    ):
        Finals(trained, SMALL, {})


def test_a_search_that_was_removed_is_told(tmp_path, alone):
    trained = searched_run(tmp_path / "run", alone)
    for file in trained.run.search_files():
        file.unlink()
    with pytest.raises(UserError, match=r"tells of no search of this version \(its search is gone\)"):
        Finals(trained, SMALL, {})


BAD_RESULTS = ("[]", "{}", '{"request": {"arch": "c8"}, "one_shot_loss": 1, "scores": {"top1": 1}}')


@pytest.mark.parametrize("content", BAD_RESULTS)
def test_a_damaged_result_of_a_rung_is_told(tmp_path, content):
    run = untrained_run(tmp_path / "run")
    file = run.finals / "0123" / "rung-1" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(UserError, match=r"holds no result of the finals .*; remove it, and repeat search/finals.py"):
        trained_networks(run)


def test_a_correction_learns_from_finals_and_ranks_the_next_search(tmp_path, alone):
    trained = searched_run(tmp_path / "run", alone)
    limits, evolution = (Limit("macs", high=40_000),), EvolutionConfig.scaled(population=9, iterations=3, seed=1)
    with pytest.raises(UserError, match="0 networks of this run are trained alone"):
        search_run(trained, limits, evolution, None, corrected=True)
    latest = LatestSearch.of(trained.run, trained.supernet.space)
    archs = {c.arch: c for c in (*latest.ranked, *latest.first)}
    for number, candidate in enumerate(archs.values()):  # as if a wide beginning were what counts
        content = {
            "request": {"arch": str(candidate.arch), "seed": 0}, "one_shot_loss": candidate.loss,
            "scores": {"top1": 0.5 + 0.05 * candidate.arch.channels[0] + 0.001 * (number % 2), "loss": 1.0},
        }  # fmt: skip
        file = trained.run.finals / f"{number:012}" / "rung-1" / "result.json"
        file.parent.mkdir(parents=True)
        write_json(file, content)
    plain = search_run(trained, limits, evolution, None)
    corrected = search_run(trained, limits, evolution, None, corrected=True)
    assert corrected["file"] != plain["file"]
    correction = Correction(trained.supernet.space, trained_networks(trained.run))
    ranked = LatestSearch.of(trained.run, trained.supernet.space).ranked
    assert [c.value for c in ranked] == sorted((c.value for c in ranked), reverse=True)
    assert [c.value for c in ranked] == pytest.approx([c.value for c in correction.expected(ranked)])
    assert ranked[0].arch.channels[0] == 8
    assert search_run(trained, limits, evolution, None, corrected=True)["best"] == corrected["best"]
    with pytest.raises(
        UserError,
        match="a corrected search with --confidence or several --objectives, which compare one-shot accuracies; leave",
    ):
        search_run(trained, limits, evolution, None, corrected=True, confidence=0.99)


def test_without_a_decay_networks_are_compared_as_they_are(tmp_path, alone):
    trained = searched_run(tmp_path / "run", alone)
    config = replace(SMALL, networks=2, random=0, decay_epochs=0)
    found = Finals(trained, config, {}).hold()
    assert [len(rung["networks"]) for rung in found["rungs"]] == [2]
    assert Finals(trained, config, {}).hold() == found
    winner = winner_of_finals(trained.run)
    assert winner is not None
    assert winner.epochs == 1
