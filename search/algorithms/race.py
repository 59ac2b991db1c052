"""Scoring a generation only as far as it takes to know which of its architectures can become parents."""

from collections.abc import Sequence

from bsnas.engine.evaluation.early_decisions import Place, Quotas
from bsnas.engine.evaluation.evaluator import Evaluator, Score
from bsnas.engine.space.space import Arch


class Race:
    """An `evolution.Evaluate` that stops early, at a stated confidence.

    New architectures and the best so far are compared image by image. One that is certainly not among the best
    `parents` sees no more images, and its score is marked as not complete; those that are among them see all.
    """

    def __init__(self, evaluator: Evaluator, parents: int, confidence: float, known: Sequence[Arch] = ()) -> None:
        """`known` are architectures of an interrupted search whose scores are complete."""
        self._evaluator = evaluator
        self._parents = parents
        self._confidence = confidence
        self._complete: dict[Arch, Score] = dict(zip(known, evaluator.evaluate(known), strict=True))

    def __call__(self, archs: Sequence[Arch]) -> list[Score]:
        """Scores in order. Raises `UserError` as `Evaluator.place` does."""
        best = sorted(self._complete, key=lambda arch: (-self._complete[arch].top1, self._complete[arch].loss))
        contenders = [*best[: self._parents], *archs]
        quotas = Quotas(best=min(self._parents, len(contenders)))
        placement = self._evaluator.place(contenders, quotas, confidence=self._confidence)
        winners = [arch for arch, place in zip(contenders, placement.places, strict=True) if place is Place.BEST]
        self._complete |= dict(zip(winners, self._evaluator.evaluate(winners), strict=True))
        scores = self._evaluator.seen_so_far(archs)
        self._complete |= {arch: score for arch, score in zip(archs, scores, strict=True) if score.complete}
        return scores
