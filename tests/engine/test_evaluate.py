"""The batched evaluator computes what a plain loop over the supernet computes."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import engine.evaluate as evaluate_module
from engine.evaluate import Evaluator, Score
from engine.sampling import fair_archs
from engine.space import Arch, Space
from tests.engine.evaluation_cases import (
    counts,
    loop_logits,
    random_images,
    recalibrated_alone,
    shrunk_space,
    small_space,
    trained_like_supernet,
)

SPACES = {"full": small_space(), "shrunk": shrunk_space(small_space())}


def archs_of(space: Space, count: int = 24) -> list[Arch]:
    return list(dict.fromkeys(fair_archs(space, seed=3, count=count)))


@pytest.fixture(scope="module")
def nested():
    return trained_like_supernet(SPACES["full"])


@pytest.mark.parametrize("sharing", ["nested", "channels", "independent"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_scores_equal_a_plain_loop(space, sharing):
    supernet = trained_like_supernet(space, sharing)
    data = random_images(50)
    archs = archs_of(space)
    logits = loop_logits(supernet, data, archs)
    scores = Evaluator(supernet, data).evaluate(archs)
    assert [score.correct1 for score in scores] == counts(logits, data.labels)
    assert [score.correct5 for score in scores] == counts(logits, data.labels, best=5)
    losses = [F.cross_entropy(each, torch.from_numpy(data.labels)).item() for each in logits]
    assert [score.loss for score in scores] == pytest.approx(losses, rel=1e-5)
    assert all(score.images == 50 and score.top1 == score.correct1 / 50 for score in scores)
    assert len({score.loss for score in scores}) > len(scores) // 2, "the case must tell architectures apart"


@pytest.mark.parametrize("sharing", ["nested", "channels"])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_recalibrated_scores_equal_recalibrating_each_subnet_alone(space, sharing, monkeypatch):
    monkeypatch.setattr(evaluate_module, "RECALIBRATION_BATCH", 16)
    monkeypatch.setattr(evaluate_module, "RECALIBRATION_PART", 5)
    supernet = trained_like_supernet(space, sharing)
    data, training = random_images(40), random_images(50, seed=1)
    archs = archs_of(space, count=12)
    alone = [recalibrated_alone(supernet, training, arch, batch=16) for arch in archs]
    logits = torch.cat([loop_logits(net, data, [arch]) for net, arch in zip(alone, archs, strict=True)])
    scores = Evaluator(supernet, data, bn="recalibrate", recalibration=training).evaluate(archs)
    assert [score.correct1 for score in scores] == counts(logits, data.labels)
    losses = [F.cross_entropy(each, torch.from_numpy(data.labels)).item() for each in logits]
    assert [score.loss for score in scores] == pytest.approx(losses, rel=1e-4)
    running = Evaluator(supernet, data).evaluate(archs)
    assert [score.loss for score in scores] != pytest.approx([score.loss for score in running], rel=1e-2)


@pytest.mark.parametrize("bn", ["running", "recalibrate"])
def test_memory_budget_and_chunks_do_not_change_scores(nested, bn):
    data, training = random_images(70), random_images(64, seed=1)
    archs = archs_of(SPACES["full"], count=36)

    def scores(budget: int | None, chunk: int) -> list[Score]:
        evaluator = Evaluator(nested, data, bn=bn, recalibration=training, memory_budget_mib=budget)
        evaluator.memory = replace(evaluator.memory, max_chunk=chunk)
        return evaluator.evaluate(archs)

    expected = scores(None, 128)
    for budget, chunk in ((1, 128), (1, 7), (None, 13), (64, 64)):
        for a, b in zip(scores(budget, chunk), expected, strict=True):
            assert (a.correct1, a.correct5) == (b.correct1, b.correct5)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
