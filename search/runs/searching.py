"""One search on a trained run: generations, Pareto set, the true latency of the last few, and what is stored of it."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from bsnas.engine.evaluation.evaluator import BatchNormMode, weights_fingerprint
from bsnas.engine.evaluation.of_run import TrainedRun
from bsnas.engine.host.distributed import on_main
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import Candidate, Evaluate, EvolutionConfig, Generation, evolve, ranked
from bsnas.search.algorithms.nsga2 import evolve_front, hypervolume, pareto_front
from bsnas.search.algorithms.race import Race
from bsnas.search.algorithms.sampler import Sampler
from bsnas.search.costs.constraints import Constraints, Limit
from bsnas.search.costs.costs import constraints_for, cost_names, cost_ranges
from bsnas.search.runs.finalists import LatencyTable, first_inside, measured_ms
from bsnas.search.runs.history import History, accuracy_front
from bsnas.search.runs.reporter import Reporter, print_finalists, print_result


def search(
    trained: TrainedRun,
    limits: tuple[Limit, ...],
    config: EvolutionConfig,
    bn: BatchNormMode | None,
    *,
    objectives: tuple[str, ...] = ("top1",),
    table: LatencyTable | None = None,
    finalists: int = 5,
    confidence: float | None = None,
) -> dict[str, Any]:
    """Run or continue one search; the main process stores and shows it. Returns the figures of --json."""
    process, space = trained.process, trained.supernet.space
    constraints = constraints_for(space, limits, table.predict if table else None)
    # The sampler comes before the evaluator reads images: limits that nothing keeps end at once.
    Sampler(space, constraints)
    evaluator = trained.evaluator(bn)
    scored_by = {
        "weights": weights_fingerprint(trained.supernet),
        "images": trained.search_val.fingerprint,
        "bn": evaluator.bn,
        **({} if confidence is None else {"confidence": str(confidence)}),
    }
    costs = cost_names(objectives)
    history = History.of(trained.run, space, constraints, config, scored_by, _more(objectives, table))
    generations = on_main(process, history.load)
    others = [_told_by(constraints, candidate) for candidate in on_main(process, history.comparable)]
    known = {candidate.arch for generation in (*generations, others) for candidate in generation}
    front_of = partial(pareto_front, costs=costs) if costs else accuracy_front
    reporter = Reporter(config.iterations, front_of, enabled=process.is_main)
    evaluate: Evaluate = evaluator.evaluate
    if confidence is not None:
        complete = [c.arch for generation in generations for c in generation if c.complete]
        evaluate = Race(evaluator, config.parents, confidence, complete)
    for generation in _generations(space, constraints, evaluate, config, costs, generations):
        generations.append(generation)
        on_main(process, lambda: history.save(generations))
        reporter.show(generations)
    found = [candidate for generation in generations for candidate in generation]
    inside = ranked([found, [candidate for candidate in others if constraints.allow(candidate.arch)]])
    front = front_of(inside if costs else [*found, *others])
    figures: dict[str, Any] = {
        "evaluations": len(found),
        "reused": sum(candidate.arch in known for candidate in found),
        "decided_early": sum(not candidate.complete for candidate in found),
        "limits": history.request["limits"],
        "objectives": list(objectives),
        "pareto": len(front),
        "file": str(history.file),
    }
    if costs:
        figures["hypervolume"] = hypervolume(front, costs, cost_ranges(space, constraints, costs))
    if process.is_main:
        print_result(inside[0], front, history.file)
    best = inside[0]
    if table is not None and table.local and finalists:
        chosen = _spread(front, finalists) if costs else inside[:finalists]
        best, measured = on_main(process, lambda: _measure(table, space, chosen, limits, best))
        figures["finalists"] = measured
    on_main(process, lambda: history.publish(best, front))
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


def _told_by(constraints: Constraints, candidate: Candidate) -> Candidate:
    """A candidate of another search with the costs that this search tells."""
    return replace(candidate, costs={name: cost(candidate.arch) for name, cost in constraints.costs.items()})


def _generations(
    space: Space,
    constraints: Constraints,
    evaluate: Evaluate,
    config: EvolutionConfig,
    costs: Sequence[str],
    done: Sequence[Generation],
) -> Iterator[Generation]:
    if costs:
        return evolve_front(space, constraints, evaluate, config, costs, done)
    return evolve(space, constraints, evaluate, config, done)


def _spread(front: Sequence[Candidate], count: int) -> list[Candidate]:
    """Evenly spaced members of a Pareto set, its ends among them."""
    steps = range(min(count, len(front)))
    return [front[round(k * (len(front) - 1) / max(1, len(steps) - 1))] for k in steps]


def _measure(
    table: LatencyTable, space: Space, finalists: Sequence[Candidate], limits: Sequence[Limit], best: Candidate
) -> tuple[Candidate, list[dict[str, Any]]]:
    """Time the finalists and show them. The best whose measured latency keeps the limit takes the place of `best`."""
    measured = measured_ms(table, space, [candidate.arch for candidate in finalists])
    limit = next((limit for limit in limits if limit.cost == "latency_ms"), None)
    print_finalists(finalists, measured, limit)
    rows = [
        {"arch": str(c.arch), "top1": c.top1, "predicted_ms": c.costs["latency_ms"], "measured_ms": ms}
        for c, ms in zip(finalists, measured, strict=True)
    ]
    if limit is not None:
        inside = first_inside(measured, limit)
        if inside is None:
            print(f"none of the {len(finalists)} measured networks keeps the limit; measure the table again")
        elif finalists[inside] != best:
            best = finalists[inside]
            print(f"taken: {best.arch}, the best one that keeps the limit as measured")
    return best, rows
