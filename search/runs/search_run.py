"""A search of a trained run: its request, what scores it, the true latency of its last few, and its figures."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bsnas.engine.config import ScoreName
from bsnas.engine.evaluation.early_decisions import Place, Quotas
from bsnas.engine.evaluation.evaluator import BatchNormMode, Evaluator, Score, weights_fingerprint
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.search.algorithms.correction import Correction
from bsnas.search.algorithms.evolution import EvolutionConfig, by_loss, by_top1
from bsnas.search.algorithms.nsga2 import hypervolume
from bsnas.search.runs.finalists import LatencyTable, evenly_spaced, time_finalists
from bsnas.search.runs.history import History
from bsnas.search.runs.printing import print_correction, print_result
from bsnas.search.runs.search import Evaluate, search
from bsnas.search.runs.trained_networks import trained_networks


def search_run(
    trained: TrainedRun,
    limits: tuple[Limit, ...],
    config: EvolutionConfig,
    bn: BatchNormMode | None,
    *,
    objectives: tuple[str, ...] = ("top1",),
    table: LatencyTable | None = None,
    finalists: int = 5,
    confidence: float | None = None,
    score: ScoreName | None = None,
    corrected: bool = False,
) -> dict[str, Any]:
    """Run or continue one search; the main process stores and shows it. Returns the figures of --json.

    `bn` and `score` are as in the run's shrink steps unless given. `corrected`: with a correction learned from the
    networks that the run's finals have trained.
    """
    score = score or trained.config.shrink.score
    if corrected and (confidence is not None or len(objectives) > 1):
        raise UserError(
            "a corrected search with --confidence or several --objectives, which compare one-shot accuracies; leave "
            "these out, or --correction"
        )
    if score == "loss" and (confidence is not None or len(objectives) > 1):
        raise UserError(
            "a search by loss with --confidence or several --objectives, which compare accuracies; leave these out, or "
            "give --score top1"
        )
    process, space = trained.process, trained.supernet.space
    problem = Problem.of(space, limits, objectives=objectives, latency=table.cost if table else None)
    evaluator = trained.evaluator(bn)
    scored_by = {
        "weights": weights_fingerprint(trained.supernet),
        "images": trained.search_val.fingerprint,
        "bn": evaluator.bn,
        **({} if confidence is None else {"confidence": str(confidence)}),
    }
    more = _more(objectives, table) | ({} if score == "top1" else {"score": score})
    networks = on_main(process, lambda: trained_networks(trained.run)) if corrected else []
    correction = Correction(space, networks) if corrected else None
    if correction is not None:
        more["correction"] = hashlib.sha256(repr(networks).encode()).hexdigest()[:16]
    history = History.of(process, trained.run, problem, config, scored_by, more)
    evaluate: Evaluate = evaluator.evaluate
    if confidence is not None:
        complete = [c.arch for generation in history.load() for c in generation if c.complete]
        evaluate = Race(evaluator, config.parents, confidence, complete)
    result = search(problem, config, evaluate, history, by_loss if score == "loss" else by_top1, correction)
    figures: dict[str, Any] = {
        "evaluations": len(result.found),
        "reused": result.reused,
        "decided_early": sum(not candidate.complete for candidate in result.found),
        "limits": history.request["limits"],
        "objectives": list(objectives),
        "pareto": len(result.front),
        "file": str(history.file),
    }
    if problem.minimised:
        ranges = {name: problem.costs[name].range() for name in problem.minimised}
        figures["hypervolume"] = hypervolume(result.front, problem.minimised, ranges)
    best = result.inside[0]
    if process.is_main:
        print_result(best, result.front, history.file)
        if correction is not None:
            print_correction(best, float(correction.predict([best])[1][0]), len(networks))
    if table is not None and table.local and finalists:
        few = evenly_spaced(result.front, finalists) if problem.minimised else result.inside[:finalists]
        best, figures["finalists"] = on_main(process, lambda: time_finalists(table, problem, few, best))
    history.publish(best, result.front, result.inside)
    return {"best": {"arch": str(best.arch), **best.costs, "top1": best.top1}, **figures}


def _more(objectives: tuple[str, ...], table: LatencyTable | None) -> dict[str, Any]:
    """What a request says beside limits and evolution; nothing for the paper's search."""
    more: dict[str, Any] = {}
    if len(objectives) > 1:
        more["objectives"] = list(objectives)
    if table is not None:
        costs = {name: part.ms for name, part in table.model.parts.items()}
        content = json.dumps([asdict(table.model.context), table.model.offset_ms, costs], sort_keys=True)
        more["latency"] = {
            "backend": table.model.context.backend,
            "batch": table.model.context.batch,
            "precision": table.model.context.precision,
            "table": hashlib.sha256(content.encode()).hexdigest()[:16],
        }
    return more


class Race:
    """An `Evaluate` that scores a generation only as far as it takes to know, at a stated confidence, which of its
    architectures can become parents.

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
