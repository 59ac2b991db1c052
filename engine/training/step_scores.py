"""What a shrink step learns of the subnets that it draws: enough to tell the best third and the worst."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bsnas.engine.config import ScoreName
from bsnas.engine.evaluation.early_decisions import Quotas
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.space.arch import Arch


@dataclass(frozen=True)
class StepScores:
    """One entry per subnet, in the order in which they were drawn."""

    top1: list[float]
    """On the images that the subnet saw."""
    ranks: Sequence[float]
    """Larger for the better subnet; equal where the drawing order is to decide."""
    images: list[int]
    """How many images it saw."""
    images_saved: float
    """Share of all model-images that were not needed."""

    def to_json(self, archs: Sequence[Arch]) -> list[dict[str, Any]]:
        rows = zip(archs, self.top1, self.images, strict=True)
        return [{"arch": str(arch), "top1": top1, "images": images} for arch, top1, images in rows]


def score_thirds(
    evaluator: Evaluator, archs: Sequence[Arch], confidence: float | None, score: ScoreName = "top1"
) -> StepScores:
    """Score subnets on all images, or with a confidence only until it is certain which third each belongs to.

    They are ranked by `score`; a confidence is for top-1 alone.

    Raises `UserError` as `Evaluator.evaluate` and `Evaluator.place` do.
    """
    if confidence is None:
        scores = evaluator.evaluate(archs)
        top1 = [one.top1 for one in scores]
        ranks = [-one.loss for one in scores] if score == "loss" else top1
        return StepScores(top1, ranks, [one.images for one in scores], 0.0)
    third = len(archs) // 3
    placement = evaluator.place(archs, Quotas(best=third, worst=third), confidence=confidence)
    return StepScores(placement.top1, placement.ranks, placement.images_seen, placement.images_saved)
