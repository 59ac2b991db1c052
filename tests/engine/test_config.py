"""Configurations: the paper's numbers, JSON, command lines, and every error."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bsnas.engine.config import OptimizerConfig, RunConfig, SamplingConfig, ShrinkConfig, from_json, to_json
from bsnas.engine.host.errors import EXIT_USER_ERROR, UserError
from bsnas.engine.host.script import option, parse, run, write_figures
from bsnas.engine.presets import PRESETS, preset

FILE = Path("config.json")


def test_the_papers_numbers():
    config = preset("imagenet")
    assert config.shrink == ShrinkConfig(
        first_epochs=120, interval_epochs=40, keep=(9, 5, 3), models_per_operation=200, bn="running"
    )
    assert config.shrink.total_epochs == 240
    assert config.shrink.step_epochs == (120, 160, 200)
    assert config.optimizer == OptimizerConfig(
        batch_size=512, learning_rate=0.045, momentum=0.9, weight_decay=4e-5, warmup_epochs=5, label_smoothing=0
    )
    assert config.sampling == SamplingConfig(sampler="fair", update="round", batches="shared")
    assert (config.retrain.epochs, config.retrain.learning_rate, config.retrain.batch_size) == (240, 0.045, 512)
    assert (config.data.resolution, config.data.val_per_class, config.data.augment) == (224, 50, "resized-crop")
    assert config.sharing == "channels"


def test_no_shrinking_is_a_training_of_the_first_epochs():
    assert ShrinkConfig(first_epochs=7, keep=()).total_epochs == 7
    assert ShrinkConfig(keep=()).step_epochs == ()


# ---- JSON


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json(name):
    config = preset(name)
    data = json.loads(json.dumps(to_json(config)))
    again = from_json(RunConfig, data, FILE)
    assert again == config
    assert again.space.fingerprint == config.space.fingerprint


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("sharing",), "own", "config.json: sharing: Input should be 'nested', 'channels' or 'independent'"),
        (("seed",), "x", "config.json: seed: Input should be a valid integer"),
        (("optimizer", "momentum"), 1.5, "config.json: optimizer: .*0 <= momentum < 1"),
        (("shrink", "keep"), [3, 5], "config.json: shrink: .*give falling numbers of at least 1"),
        (("space", "classes"), 0, "config.json: space: .*classes of a space is 0"),
        (("data", "resolution"), 32, "data resolution 32 and space resolution 16 differ; set both to the same"),
        (("optimizer", "warmup_epochs"), 500, "warmup of 500.0 epochs in a training of 54"),
        (("precision",), "int8", "config.json: precision: "),
    ],
)
def test_a_damaged_configuration_is_refused_with_its_place(path, value, message):
    data = to_json(preset("digits"))
    node = data
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message):
        from_json(RunConfig, data, FILE)


def test_a_missing_field_and_no_configuration_at_all():
    data = to_json(preset("digits"))
    del data["preset"]
    with pytest.raises(UserError, match=r"config.json: preset: Field required; take a file that this program wrote"):
        from_json(RunConfig, data, FILE)
    for junk in (None, 3, [], "text", {}):
        with pytest.raises(UserError, match=r"^config.json: "):
            from_json(RunConfig, junk, FILE)


# ---- checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch size 0, .*need batch size >= 1, learning rate > 0 and 0 <= momentum < 1"),
        ({"learning_rate": 0}, "learning rate 0, .*need batch size >= 1"),
        ({"momentum": 1}, "momentum 1: need batch size >= 1"),
        ({"weight_decay": -1}, "weight decay -1, .*need values >= 0, label smoothing < 1"),
        ({"warmup_epochs": -1}, "warmup epochs -1, .*need values >= 0"),
        ({"label_smoothing": 1}, "label smoothing 1: need values >= 0"),
    ],
)
def test_optimizers_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(OptimizerConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_epochs": 0}, "first epochs 0, .*each must be at least 1"),
        ({"interval_epochs": 0}, "interval epochs 0, .*each must be at least 1"),
        ({"models_per_operation": 0}, "models per operation 0: each must be at least 1"),
        ({"keep": (9, 9)}, r"keep \(9, 9\): give falling numbers of at least 1, as 9 5 3"),
        ({"keep": (3, 0)}, r"keep \(3, 0\): give falling numbers"),
        ({"keep": (3, 5)}, r"keep \(3, 5\): give falling numbers"),
        ({"confidence": 1.5}, "shrink confidence 1.5 with bn running and score top1: give a number between 0.5 and 1"),
        (
            {"confidence": 0.999, "bn": "recalibrate"},
            "with bn recalibrate and score top1: .* --shrink.bn",
        ),
        (
            {"confidence": 0.999, "score": "loss"},
            "bn running and score loss: .* and --shrink.score top1",
        ),
    ],
)
def test_shrinking_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(ShrinkConfig(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampler": "sandwich", "update": "path"},
            "the sandwich with update path and shared batches; it makes one step of all its paths on one batch: "
            "give --sampling.update round --sampling.batches shared",
        ),
        ({"sampler": "sandwich", "batches": "fresh"}, "the sandwich with update round and fresh batches"),
        (
            {"distill": "kl"},
            "distill kl with the fair sampler, whose rounds have no largest network to learn from; "
            "give --sampling.sampler sandwich, or --sampling.distill none",
        ),
        ({"sandwich_paths": 0}, "sandwich paths 0; need at least 1"),
        ({"complexity_decay": 0.5}, r"complexity decay 0.5: give a number from 1 \(off\) to 10, as 2"),
        ({"complexity_decay": math.nan}, "complexity decay nan: give a number"),
        (
            {"complexity_decay": 2},
            "complexity decay 2 with one step per round, whose paths share a rate; give --sampling.update path, "
            "which the sandwich cannot have, or --sampling.complexity-decay 1",
        ),
    ],
)
def test_sampling_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SamplingConfig(), **changes)


def test_a_run_must_fit_together():
    config = preset("digits")
    with pytest.raises(
        UserError, match=r"warmup of 54 epochs in a training of 54; set --optimizer.warmup-epochs lower"
    ):
        replace(config, optimizer=replace(config.optimizer, warmup_epochs=54))
    with pytest.raises(UserError, match="data resolution 32 and space resolution 16 differ"):
        replace(config, data=replace(config.data, resolution=32))


# ---- command lines


def test_a_command_line_changes_a_preset():
    argv = ["--optimizer.batch-size", "32", "--shrink.keep", "5", "2", "--sharing", "independent", "--local_rank=0"]
    config = parse(RunConfig, "text", argv, default=preset("digits"))
    assert config.optimizer == replace(preset("digits").optimizer, batch_size=32)
    assert config.shrink.keep == (5, 2)
    assert config.sharing == "independent"
    assert config.space == preset("digits").space
    assert parse(RunConfig, "text", [], default=preset("digits")) == preset("digits")


def test_a_command_line_that_breaks_a_rule_raises_the_rules_message():
    with pytest.raises(UserError, match=r"learning rate -1.0"):
        parse(RunConfig, "text", ["--optimizer.learning-rate", "-1"], default=preset("digits"))


@pytest.mark.parametrize("argv", [["--nonsense"], ["--seed", "x"], ["--sharing", "own"]])
def test_a_command_line_that_does_not_parse_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(RunConfig, "text", argv, default=preset("digits"))
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit):
        parse(RunConfig, "What this does.", ["--help"], default=preset("digits"))
    text = capsys.readouterr().out
    assert "What this does." in text
    assert "--shrink.models-per-operation" in text
    assert "gradients of a round's paths add up" in " ".join(text.replace("│", " ").split())


@dataclass(frozen=True, kw_only=True)
class Pair:
    a: int = 1
    b: int


def test_a_required_option(capsys):
    assert parse(Pair, None, ["--b", "3"]) == Pair(a=1, b=3)
    with pytest.raises(SystemExit):
        parse(Pair, None, [])
    assert "--b" in capsys.readouterr().err


def test_an_option_read_before_the_rest():
    assert option(["--x", "1", "--preset", "digits"], "preset") == "digits"
    assert option(["--preset=a=b"], "preset") == "a=b"
    assert option(["--preset"], "preset") is None
    assert option(["--presets", "digits"], "preset") is None


# ---- errors and figures


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    def fails() -> None:
        raise UserError("this is wrong; do that")

    with pytest.raises(SystemExit) as stop:
        run(fails)
    assert stop.value.code == EXIT_USER_ERROR == 2
    assert capsys.readouterr().err == "error: this is wrong; do that\n"
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        run(fails)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: print(1 // 0))


def test_figures(tmp_path):
    write_figures(None, {"a": 1})
    write_figures(tmp_path / "new" / "figures.json", {"top1": 0.5})
    assert json.loads((tmp_path / "new" / "figures.json").read_text()) == {"top1": 0.5}
    with pytest.raises(UserError, match=r"figures cannot be written to .*; choose another --json"):
        write_figures(tmp_path / "new" / "figures.json" / "below.json", {})
