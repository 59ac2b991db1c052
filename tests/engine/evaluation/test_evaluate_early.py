"""Early decisions put architectures where a full evaluation puts them, from fewer images."""

import numpy as np
import pytest

from bsnas.engine.evaluation.early_decisions import (
    LOOKS,
    PairedComparisons,
    Place,
    Placement,
    Quotas,
    place_early,
    places_of,
)
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.store import Tally
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.sampling import fair_archs
from tests.engine.evaluation.cases import random_images, small_space, trained_like_supernet

ARCHS = list(dict.fromkeys(fair_archs(small_space(), seed=3, count=200)))
IMAGES = 2000


def simulated(top1: np.ndarray, seed: int) -> np.ndarray:
    """Answers bool [archs, IMAGES] that agree as networks do: an image is hard or easy for all of them."""
    rng = np.random.default_rng(seed)
    ease = rng.normal(size=IMAGES)
    noise = rng.normal(size=(len(top1), IMAGES))
    score = 0.8 * ease + 0.6 * noise
    return score > np.quantile(score, 1 - top1, axis=None)[:, None]


def place(answers: np.ndarray, archs: list, quotas: Quotas, confidence: float = 0.999) -> tuple[Placement, list]:
    """`place_early` over given answers, and the ranges that it asked for."""
    tallies = {arch: Tally() for arch in archs}
    row = {arch: answers[i] for i, arch in enumerate(tallies)}
    asked = []

    def run(group, start, stop):
        asked.append((start, stop, len(group)))
        for arch in group:
            assert tallies[arch].seen == start
            tallies[arch] = tallies[arch].plus(Tally.of(row[arch][start:stop], 0, 0.0))

    return place_early(archs, quotas, confidence, IMAGES, tallies, run), asked


@pytest.mark.parametrize("seed", range(8))
def test_few_places_differ_from_a_full_evaluation_at_999_in_a_thousand(seed):
    top1 = np.random.default_rng(seed).uniform(0.5, 0.95, len(ARCHS))
    answers = simulated(top1, seed)
    third = len(ARCHS) // 3
    placement, asked = place(answers, ARCHS, Quotas(best=third, worst=third))
    assert placement.differing(answers.mean(1).tolist(), Quotas(best=third, worst=third)) <= 1
    assert placement.images_saved > 0.4
    assert sum((stop - start) * archs for start, stop, archs in asked) == sum(placement.images_seen)


def test_the_best_few_of_many_are_found_with_few_images():
    top1 = np.concatenate([np.full(10, 0.93), np.linspace(0.5, 0.8, len(ARCHS) - 10)])
    placement, _ = place(simulated(top1, 0), ARCHS, Quotas(best=10))
    assert [i for i, at in enumerate(placement.places) if at is Place.BEST] == list(range(10))
    assert placement.images_saved > 0.8


def test_equal_architectures_are_never_decided_early_but_all_get_a_place():
    answers = np.tile(simulated(np.array([0.8]), 0), (9, 1))
    placement, _ = place(answers, ARCHS[:9], Quotas(best=3, worst=3))
    assert placement.images_saved == 0
    assert placement.order == list(range(9)), "ties keep the order in which they came"
    assert placement.places == [Place.BEST] * 3 + [Place.MIDDLE] * 3 + [Place.WORST] * 3


def test_repeated_architectures_count_as_often_as_they_come():
    top1 = np.array([0.95, 0.75, 0.55])
    archs = [ARCHS[0]] * 3 + [ARCHS[1]] * 3 + [ARCHS[2]] * 3
    placement, _ = place(simulated(top1, 0), archs, Quotas(best=3, worst=3))
    assert placement.places == [Place.BEST] * 3 + [Place.MIDDLE] * 3 + [Place.WORST] * 3
    assert placement.images_saved > 0.5


def test_paired_comparisons_count_common_images_only():
    comparisons = PairedComparisons(2, 400, [1, 1])
    rng = np.random.default_rng(0)
    both, alone = rng.random((2, 100)) < 0.5, rng.random((1, 60)) < 0.5
    comparisons.add([0, 1], both)
    comparisons.add([0], alone)
    assert comparisons.seen.tolist() == [160, 100]
    assert comparisons._right[0, 1] == both[0].sum()
    assert comparisons._right[1, 0] == both[1].sum()
    assert comparisons._both[0, 1] == (both[0] & both[1]).sum()


def test_an_evaluator_places_as_it_evaluates_and_goes_on_from_what_is_stored(tmp_path):
    supernet, data, archs = trained_like_supernet(small_space()), random_images(200), ARCHS[:12]
    quotas = Quotas(best=4, worst=4)
    evaluator = Evaluator(supernet, data, store=tmp_path / "evaluations.sqlite")
    placement = evaluator.place(archs, quotas)
    scores = Evaluator(supernet, data, store=tmp_path / "evaluations.sqlite").evaluate(archs)
    assert scores == Evaluator(supernet, data).evaluate(archs)
    order = sorted(range(12), key=lambda i: -scores[i].top1)
    assert places_of(order, quotas) == placement.places
    assert evaluator.place(archs, quotas) == placement


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quotas": Quotas(best=3, worst=2)}, "best 3 and the worst 2 of 4"),
        ({"quotas": Quotas(best=-1)}, "two numbers from 0"),
        ({"quotas": Quotas(best=1), "confidence": 99.9}, "confidence 99.9 is no confidence; give a number between"),
    ],
)
def test_impossible_questions_are_explained(arguments, message):
    evaluator = Evaluator(trained_like_supernet(small_space()), random_images(8))
    with pytest.raises(UserError, match=message):
        evaluator.place(ARCHS[:4], **arguments)


def test_looks_divide_the_images_evenly():
    _, asked = place(np.ones((4, IMAGES), bool), ARCHS[:4], Quotas(best=2))
    assert {stop - start for start, stop, _ in asked} == {IMAGES // LOOKS}
