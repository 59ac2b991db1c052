"""What a study measures of one trained supernet."""

import random
import statistics
from dataclasses import dataclass
from typing import Any

from bsnas.benchmarks.parts.study.agreement import agreement
from bsnas.benchmarks.parts.study.trained_alone import TrainedAlone
from bsnas.engine.evaluation.evaluator import BatchNormMode
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limited_sampling import check_limits
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import EvolutionConfig
from bsnas.search.runs.search_run import search_run

MODES: tuple[BatchNormMode, ...] = ("running", "recalibrate")
RANDOM_SUBNETS = 20
RESAMPLES = 2000


@dataclass(frozen=True)
class Pool:
    """Architectures that were trained alone, each with every seed."""

    archs: tuple[Arch, ...]
    macs: tuple[int, ...]
    top1_by_seed: tuple[tuple[float, ...], ...]
    """Test top-1 for each seed, in the order of the architectures."""

    @property
    def top1(self) -> list[float]:
        """Means over seeds."""
        return [statistics.mean(values) for values in zip(*self.top1_by_seed, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """With how well the first two seeds agree, which no other ranking can do much better than, and MACs rank."""
        seeds = self.top1_by_seed
        return {
            "archs": [str(arch) for arch in self.archs],
            "top1_by_seed": [list(values) for values in seeds],
            "macs_agree": agreement(self.macs, self.top1, resamples=RESAMPLES),
            "seeds_agree": agreement(seeds[0], seeds[1], resamples=RESAMPLES) if len(seeds) > 1 else None,
        }


def measure_supernet(
    trained: TrainedRun, limit: Limit, evolution: EvolutionConfig, alone: TrainedAlone, pool: Pool
) -> dict[str, Any]:
    """Accuracies of random subnets, agreement with networks trained alone, and what evolution finds, retrained.

    There is no agreement where a network of the pool is no longer in the space.
    """
    space = trained.supernet.space
    rng = random.Random(f"{trained.config.seed}/study")
    drawn = [uniform_arch(space, rng) for _ in range(RANDOM_SUBNETS)]
    comparable = len(pool.archs) > 1 and all(_holds(space, arch) for arch in pool.archs)
    random_top1, ranking, one_shot = {}, {}, {}
    for bn in MODES:
        evaluator = trained.evaluator(bn)
        random_top1[bn] = sorted(score.top1 for score in evaluator.evaluate(drawn))
        if comparable:
            one_shot[bn] = [score.top1 for score in evaluator.evaluate(pool.archs)]
            ranking[bn] = agreement(one_shot[bn], pool.top1, resamples=RESAMPLES)
    facts, limits = RunFacts(trained.run.path), _reachable(space, limit)
    best = search_run(trained, limits, evolution, None)["best"]
    return {
        "random_top1": random_top1,
        "probes": facts.probes,
        "ranking": ranking,
        "pool": pool.to_json() if comparable else None,
        "pool_one_shot": one_shot,
        "best": best,
        "limit_kept": bool(limits),
        "retrained_top1": alone.top1(trained.config.space, Arch.parse(best["arch"])),
        "training_s": sum(line["seconds"] for line in facts.epochs),
    }


def _reachable(space: Space, limit: Limit) -> tuple[Limit, ...]:
    """The limit, or none where shrinking has left nothing that keeps it."""
    try:
        check_limits(Problem.of(space, (limit,)))
    except UserError:
        return ()
    return (limit,)


def _holds(space: Space, arch: Arch) -> bool:
    try:
        space.check(arch)
    except UserError:
        return False
    return True
