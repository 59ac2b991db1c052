"""Methods to train a table's supernet: the factorial that they form, and that a training is found again."""

from collections import Counter
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest

from bsnas.benchmarks.parts.tabular import methods
from bsnas.benchmarks.parts.tabular.methods import FRACTION, METHODS, RULES, Method, train
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.spaces import space_named
from tests.engine.training.cases import tiny_config

FACTORS = [field.name for field in fields(Method)]


@pytest.mark.parametrize("pair", list(combinations(FACTORS, 2)))
def test_every_level_of_a_factor_meets_every_level_of_another_equally_often(pair):
    fraction = [METHODS[name] for name in FRACTION]
    counts = Counter(tuple(getattr(method, factor) for factor in pair) for method in fraction)
    levels = [{getattr(method, factor) for method in METHODS.values()} for factor in pair]
    assert len(counts) == len(levels[0]) * len(levels[1])
    assert len(set(counts.values())) == 1


def test_methods_are_named_after_what_they_do():
    for name, method in METHODS.items():
        decay, crop = "decay" if method.weight_decay else "free", "crop" if method.crop else "light"
        assert name == f"{method.rule}-{method.sharing}-{decay}-{crop}"
        config = method.config(space_named("nas-bench-macro"), Path("images"), 3)
        assert config.sampling == RULES[method.rule].sampling
        assert (config.seed, config.sharing, config.data.path) == (3, method.sharing, "images")
        assert config.shrink.step_epochs == ()


def test_a_training_is_done_once_and_another_is_refused(alone: Process, tmp_path: Path, monkeypatch):
    config = tiny_config(tmp_path / "cache")
    monkeypatch.setitem(methods.METHODS, "tiny", SimpleNamespace(config=lambda space, images, seed, passes: config))
    train("tiny", config.space, Path("images"), 0, tmp_path / "run", alone)
    run = RunDir(tmp_path / "run")
    lines = run.metrics_file.read_text()
    assert [probe["when"] for probe in RunFacts(run.path).probes][-1] == "final"
    train("tiny", config.space, Path("images"), 0, tmp_path / "run", alone)
    assert run.metrics_file.read_text() == lines
    message = "holds a run that is not of fair-channels-decay-crop with seed 0 and 12 passes on images"
    with pytest.raises(UserError, match=message):
        train("fair-channels-decay-crop", config.space, Path("images"), 0, tmp_path / "run", alone)


def test_images_of_another_number_of_classes_are_refused(alone: Process, tmp_path: Path, monkeypatch):
    config = tiny_config(tmp_path / "cache")
    monkeypatch.setitem(methods.METHODS, "tiny", SimpleNamespace(config=lambda space, images, seed, passes: config))
    space = SimpleNamespace(classes=3)
    with pytest.raises(UserError, match="images has 10 classes and the table 3; give its images"):
        train("tiny", space, Path("images"), 0, tmp_path / "run", alone)  # type: ignore[arg-type]
