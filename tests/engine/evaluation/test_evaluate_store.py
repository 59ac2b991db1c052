"""Nothing is evaluated twice, and a killed evaluation goes on where it was."""

import math
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bsnas.engine.evaluation.counting import TreeCounter
from bsnas.engine.evaluation.evaluator import Evaluator, weights_fingerprint
from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.evaluation.store import EvaluationStore, StoreKey, Tally
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.sampling import fair_archs
from tests.engine.evaluation.cases import random_images, small_space, trained_like_supernet

ARCHS = list(dict.fromkeys(fair_archs(small_space(), seed=3, count=36)))


@pytest.fixture(scope="module")
def supernet():
    return trained_like_supernet(small_space())


@pytest.fixture
def counted(monkeypatch):
    """Every (start, stop) range of images that really was run, with the number of architectures."""
    ranges: list[tuple[int, int, int]] = []
    count = TreeCounter._count_chunk

    def recorded(self, start, stop, *memory):
        counts = count(self, start, stop, *memory)
        ranges.append((start, start + counts.images, len(self.tree.leaves)))
        return counts

    monkeypatch.setattr(TreeCounter, "_count_chunk", recorded)
    return ranges


def table(path: Path) -> list[tuple]:
    database = EvaluationStore(path)
    rows = database._database.execute("SELECT * FROM evaluations ORDER BY arch").fetchall()
    database.close()
    return rows


def test_stored_and_repeated_architectures_are_not_run_again(supernet, tmp_path, counted):
    data, path = random_images(40), tmp_path / "evaluations.sqlite"
    first = Evaluator(supernet, data, store=path).evaluate([*ARCHS[:10], *ARCHS[:10]])
    assert first[:10] == first[10:]
    assert sum((stop - start) * archs for start, stop, archs in counted) == 40 * 10
    counted.clear()
    evaluator = Evaluator(supernet, data, store=path)
    assert evaluator.evaluate(ARCHS[:10]) == first[:10]
    assert counted == []
    evaluator.evaluate(ARCHS[:12])
    assert {archs for _, _, archs in counted} == {2}
    counted.clear()
    assert evaluator.evaluate(ARCHS[2:12])[:8] == first[2:10]
    assert counted == []


def test_other_weights_images_or_statistics_are_other_evaluations(supernet, tmp_path, counted):
    data, training, path = random_images(20), random_images(32, seed=1), tmp_path / "evaluations.sqlite"
    other_weights = trained_like_supernet(small_space(), seed=1)
    assert weights_fingerprint(other_weights) != weights_fingerprint(supernet)
    for evaluator in (
        Evaluator(supernet, data, store=path),
        Evaluator(other_weights, data, store=path),
        Evaluator(supernet, random_images(20, seed=2), store=path),
        Evaluator(supernet, data, store=path, bn="recalibrate", recalibration=training),
        Evaluator(supernet, data, store=path, bn="recalibrate", recalibration=random_images(32, seed=3)),
    ):
        counted.clear()
        evaluator.evaluate(ARCHS[:3])
        assert sum((stop - start) * archs for start, stop, archs in counted) == 20 * 3


def test_weights_that_change_are_noticed(tmp_path, counted):
    supernet = trained_like_supernet(small_space())
    evaluator = Evaluator(supernet, random_images(20), store=tmp_path / "evaluations.sqlite")
    before = evaluator.evaluate(ARCHS[:3])
    supernet.classifier.weight.data.mul_(1.5)
    counted.clear()
    assert evaluator.evaluate(ARCHS[:3]) != before
    assert counted != []


def test_architectures_that_are_behind_catch_up_first(supernet, tmp_path, counted):
    data, path = random_images(40), tmp_path / "evaluations.sqlite"
    whole = Evaluator(supernet, data, store=path).evaluate(ARCHS[:6])
    key = StoreKey(weights_fingerprint(supernet), data.fingerprint, "running float32")
    store = EvaluationStore(path)
    tallies = store.load(key)
    assert len(tallies) == 6
    first_25 = replace(data, images=data.images[(chosen := visiting_order(40)[:25])], labels=data.labels[chosen])
    halves = Evaluator(supernet, first_25).evaluate(ARCHS[:4])
    for arch, half in zip(ARCHS, halves, strict=False):
        answers = tallies[str(arch)].answers[:25]
        assert answers.sum() == half.correct1
        store.save(key, {str(arch): Tally.of(answers, half.correct5, half.loss * 25)})
    store.save(key, {str(arch): Tally() for arch in ARCHS[4:6]})
    store.close()
    counted.clear()
    again = Evaluator(supernet, data, store=path).evaluate(ARCHS[:6])
    assert [(s.correct1, s.correct5) for s in again] == [(s.correct1, s.correct5) for s in whole]
    assert {(start < 25, archs) for start, _, archs in counted} == {(True, 2), (False, 6)}


def evaluate_slowly(path: Path) -> None:
    """Ten rounds of work or more, half of them with statistics of its own."""
    supernet, data = trained_like_supernet(small_space()), random_images(40)
    for arguments in ({}, {"bn": "recalibrate", "recalibration": random_images(32, seed=1)}):
        evaluator = Evaluator(supernet, data, store=path, **arguments)
        evaluator.memory = replace(evaluator.memory, max_chunk=4)
        evaluator.evaluate(ARCHS[:12])


@pytest.mark.timeout(120)
def test_killed_at_random_moments_it_ends_with_the_same_table(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bsnas.engine.evaluation.evaluator", "tests.engine.evaluation.cases"])
    evaluate_slowly(tmp_path / "whole.sqlite")
    started = time.perf_counter()
    warm = context.Process(target=evaluate_slowly, args=(tmp_path / "warm.sqlite",))
    warm.start()
    warm.join()
    duration = time.perf_counter() - started
    expected = table(tmp_path / "whole.sqlite")
    assert table(tmp_path / "warm.sqlite") == expected
    moments = random.Random(0)
    partial = 0
    for attempt in range(10):
        path = tmp_path / f"{attempt}.sqlite"
        worker = context.Process(target=evaluate_slowly, args=(path,))
        worker.start()
        if attempt % 2:  # in the middle of the work, however slow the process was to start
            while worker.is_alive() and not (path.exists() and table(path)):
                time.sleep(0.005)
        else:  # anywhere, the time before the work included
            worker.join(moments.uniform(0.1, 0.9) * duration)
        worker.kill()
        worker.join()
        partial += path.exists() and len(table(path)) > 0 and table(path) != expected
        evaluate_slowly(path)
        assert table(path) == expected
    assert partial >= 3, "the kills must hit the work, not the time before or after it"


def test_sums_with_losses_that_are_no_number_are_kept(tmp_path):
    store = EvaluationStore(tmp_path / "evaluations.sqlite")
    key = StoreKey("w", "i", "m")
    answers = np.array([True, False, True])
    store.save(key, {"a": Tally.of(answers, 3, math.nan), "b": Tally.of(answers, 2, math.inf)})
    loaded = store.load(key)
    assert math.isnan(loaded["a"].loss_sum)
    assert loaded["b"] == Tally.of(answers, 2, math.inf)
    assert loaded["b"].correct1 == 2
    assert loaded["b"].answers.tolist() == answers.tolist()
    assert store.load(StoreKey("w", "i", "other")) == {}


def test_a_file_that_is_no_store_is_refused(tmp_path):
    path = tmp_path / "evaluations.sqlite"
    path.write_text("this is no database, but long enough to look at" * 20)
    with pytest.raises(UserError, match=r"evaluations\.sqlite.*give a file"):
        EvaluationStore(path)
    with pytest.raises(UserError, match="cannot use"):
        EvaluationStore(tmp_path / "missing" / "evaluations.sqlite")
