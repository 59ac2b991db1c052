"""A shrink step that decides early keeps what one that scores every subnet on all images keeps."""

import json

import pytest

from bsnas.benchmarks.early_decisions import repeat_step
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.sampling import fair_archs
from bsnas.engine.space.shrink import importance, shrink
from bsnas.engine.training.step_scores import score_thirds
from tests.engine.evaluation.cases import labelled_images, random_images, small_space, trained_like_supernet
from tests.engine.training.cases import make_trainer, tiny_config
from tests.search.runs import untrained_run

SUPERNET = trained_like_supernet(small_space())
ARCHS = fair_archs(small_space(), seed=1, count=24)
IMAGES = 1280


DATA = labelled_images(SUPERNET, ARCHS[0], IMAGES)


def evaluator(**options) -> Evaluator:
    return Evaluator(SUPERNET, DATA, progress=False, **options)


def test_without_a_confidence_every_subnet_sees_every_image_and_ties_are_left_to_the_order():
    scores = score_thirds(evaluator(), ARCHS, None)
    assert scores.top1 == [score.top1 for score in evaluator().evaluate(ARCHS)]
    assert scores.ranks == scores.top1
    assert scores.images == [IMAGES] * len(ARCHS)
    assert scores.images_saved == 0


def test_subnets_are_ranked_by_loss_where_that_is_asked_for():
    scores = score_thirds(evaluator(), ARCHS, None, "loss")
    assert scores.ranks == [-score.loss for score in evaluator().evaluate(ARCHS)]
    assert scores.top1 == score_thirds(evaluator(), ARCHS, None).top1


def test_early_thirds_lead_to_the_same_space_from_fewer_images():
    full, early = (score_thirds(evaluator(), ARCHS, confidence) for confidence in (None, 0.999))
    kept = [shrink(small_space(), importance(small_space(), ARCHS, scores.ranks), 2) for scores in (full, early)]
    assert kept[0] == kept[1]
    assert 0 < early.images_saved < 1
    assert early.images_saved == pytest.approx(1 - sum(early.images) / (len(ARCHS) * IMAGES))
    rows = early.to_json(ARCHS)
    assert [row["arch"] for row in rows] == [str(arch) for arch in ARCHS]
    assert min(row["images"] for row in rows) < IMAGES


def test_early_thirds_need_running_statistics():
    recalibrating = evaluator(bn="recalibrate", recalibration=random_images(16))
    with pytest.raises(UserError, match="early decisions need bn running"):
        score_thirds(recalibrating, ARCHS, 0.999)


def test_the_steps_of_a_run_are_repeated_from_the_weights_that_they_scored(alone, tmp_path):
    config = tiny_config(tmp_path / "cache")
    run = RunDir.create(tmp_path / "run", config)
    make_trainer(run, config, alone).train()
    step = repeat_step(run.path, 0.999, alone, 1)
    models = json.loads(run.shrink_file(1).read_text())["models"]
    assert (step["models"], step["images"]) == (len(models), models[0]["images"])
    assert step["blocks_kept_alike"] == step["blocks"] == config.space.num_blocks
    assert step["thirds_differing"] == 0
    assert step["top1"] == [model["top1"] for model in models], "the weights are those of the step"
    with pytest.raises(UserError, match=r"shrink step 2 of .*; its configuration has steps 1 to 1"):
        TrainedRun.open(run.path, alone, 2)


def test_a_step_that_is_not_made_cannot_be_repeated(alone, tmp_path):
    with pytest.raises(UserError, match="has not come to shrink step 1 yet"):
        TrainedRun.open(untrained_run(tmp_path / "run").path, alone, 1)
