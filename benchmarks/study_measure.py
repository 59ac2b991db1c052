"""What a study measures of one trained supernet."""

import json
import random
from collections.abc import Sequence
from typing import Any

from benchmarks.agreement import agreement
from benchmarks.trained_alone import TrainedAlone
from engine.errors import UserError
from engine.evaluate import BatchNormMode
from engine.sampling import uniform_arch
from engine.space import Arch, Space
from engine.trained_run import TrainedRun
from search.constraints import Limit
from search.costs import constraints_for
from search.evolution import EvolutionConfig
from search.sampler import Sampler
from search.searching import search

MODES: tuple[BatchNormMode, ...] = ("running", "recalibrate")
RANDOM_SUBNETS = 20


def measure_supernet(
    trained: TrainedRun,
    limit: Limit,
    evolution: EvolutionConfig,
    alone: TrainedAlone,
    pool: Sequence[tuple[Arch, float]],
) -> dict[str, Any]:
    """Accuracies of random subnets, agreement with networks trained alone, and what evolution finds, retrained.

    `pool` has architectures and their test top-1. Where one of them is no longer in the space there is no agreement.
    """
    space = trained.supernet.space
    rng = random.Random(f"{trained.config.seed}/study")
    drawn = [uniform_arch(space, rng) for _ in range(RANDOM_SUBNETS)]
    archs, alone_top1 = [arch for arch, _ in pool], [top1 for _, top1 in pool]
    comparable = len(pool) > 1 and all(_holds(space, arch) for arch in archs)
    random_top1, ranking, one_shot = {}, {}, {}
    for bn in MODES:
        evaluator = trained.evaluator(bn)
        random_top1[bn] = sorted(score.top1 for score in evaluator.evaluate(drawn))
        if comparable:
            one_shot[bn] = [score.top1 for score in evaluator.evaluate(archs)]
            ranking[bn] = agreement(one_shot[bn], alone_top1, resamples=2000)
    limits = _reachable(space, limit)
    best = search(trained, limits, evolution, None)["best"]
    return {
        "random_top1": random_top1,
        "probes": _lines(trained, "probe"),
        "ranking": ranking,
        "pool": [{"arch": str(arch), "stand_alone": top1} for arch, top1 in pool] if comparable else [],
        "pool_one_shot": one_shot,
        "best": best,
        "limit_kept": bool(limits),
        "retrained_top1": alone.top1(trained.config.space, Arch.parse(best["arch"])),
        "training_s": sum(line["seconds"] for line in _lines(trained, "epoch")),
    }


def _reachable(space: Space, limit: Limit) -> tuple[Limit, ...]:
    """The limit, or none where shrinking has left nothing that keeps it."""
    try:
        Sampler(space, constraints_for(space, (limit,)))
    except UserError:
        return ()
    return (limit,)


def _holds(space: Space, arch: Arch) -> bool:
    try:
        space.check(arch)
    except UserError:
        return False
    return True


def _lines(trained: TrainedRun, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, trained.run.metrics_file.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
