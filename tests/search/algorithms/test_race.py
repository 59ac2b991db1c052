"""A search that decides early finds what one that scores every subnet on all images finds."""

import random
from itertools import chain, islice

import pytest

from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.search.algorithms.evolution import EvolutionConfig, accuracy_front, ranked
from bsnas.search.evolve import EvolveArguments
from bsnas.search.runs.search import generations
from bsnas.search.runs.search_run import Race
from tests.engine.evaluation.cases import labelled_images, small_space, trained_like_supernet

SPACE = small_space()
SUPERNET = trained_like_supernet(SPACE)
IMAGES = 1280
DATA = labelled_images(SUPERNET, uniform_arch(SPACE, random.Random(0)), IMAGES)
PROBLEM = Problem(SPACE, (), {"macs": CostModel(SPACE).macs})
CONFIG = EvolutionConfig.scaled(population=12, iterations=2, seed=0)


def evaluator() -> Evaluator:
    return Evaluator(SUPERNET, DATA, progress=False)


def archs(count: int, seed: int) -> list:
    rng = random.Random(seed)
    return list(dict.fromkeys(uniform_arch(SPACE, rng) for _ in range(4 * count)))[:count]


def test_the_best_are_those_of_a_full_evaluation_and_the_others_say_that_they_are_not_complete():
    given = archs(24, seed=1)
    full = evaluator().evaluate(given)
    raced = Race(evaluator(), parents=3, confidence=0.999)(given)
    order = sorted(range(24), key=lambda i: (-full[i].top1, full[i].loss))
    assert all(raced[i] == full[i] for i in order[:3])
    incomplete = [score for score in raced if not score.complete]
    assert incomplete
    assert all(score.images < IMAGES for score in incomplete)
    assert max(score.top1 for score in incomplete) <= full[order[2]].top1 + 0.05


def test_new_architectures_race_against_the_best_so_far():
    first, second = archs(24, seed=1), archs(12, seed=2)
    race = Race(evaluator(), parents=3, confidence=0.999)
    known = {arch: score for arch, score in zip(first, race(first), strict=True) if score.complete}
    after = race(second)
    continued = Race(evaluator(), parents=3, confidence=0.999, known=list(known))
    assert continued(second) == after


def test_a_raced_search_finds_the_same_and_continues_the_same():
    plain = list(generations(PROBLEM, CONFIG, evaluator().evaluate))
    raced = list(generations(PROBLEM, CONFIG, Race(evaluator(), CONFIG.parents, 0.999)))
    best, best_raced = (ranked(chain(*found))[: CONFIG.parents] for found in (plain, raced))
    assert [c.arch for c in best_raced] == [c.arch for c in best]
    begun = list(islice(generations(PROBLEM, CONFIG, Race(evaluator(), CONFIG.parents, 0.999)), 1))
    complete = [c.arch for generation in begun for c in generation if c.complete]
    rest = list(generations(PROBLEM, CONFIG, Race(evaluator(), CONFIG.parents, 0.999, complete), begun))
    assert [*begun, *rest] == raced


def test_what_is_not_complete_is_neither_best_nor_on_the_front():
    generation = next(generations(PROBLEM, CONFIG, Race(evaluator(), 2, 0.999)))
    assert ranked(generation)[0].complete
    assert all(candidate.complete for candidate in accuracy_front(generation))


def test_a_pareto_set_needs_complete_scores(tmp_path):
    with pytest.raises(UserError, match="--confidence is for the search of the best top1"):
        EvolveArguments(run=tmp_path, objectives=("top1", "macs"), confidence=0.999)
