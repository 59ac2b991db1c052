"""The correction learned from trained networks: what it finds, what it is sure of, when it has too little."""

import random

import numpy as np
import pytest
from scipy.stats import kendalltau

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.spaces import space_named
from bsnas.search.algorithms.correction import LEAST, Correction, TrainedNetwork
from bsnas.search.algorithms.evolution import Candidate, by_loss, by_top1

SPACE = space_named("nas-bench-macro")
COSTS = CostModel(SPACE)


def quality(arch: Arch) -> float:
    """Blocks that are there and wide help, early ones most: what the one-shot loss below tells nothing of."""
    return 0.8 + sum(0.01 * (8 - i) * (op.block_op.kernel > 0) for i, op in enumerate(arch.operations)) / 4


def draw(count: int, seed: int) -> list[Arch]:
    rng = random.Random(seed)
    return list(dict.fromkeys(uniform_arch(SPACE, rng) for _ in range(count)))


def candidate(arch: Arch) -> Candidate:
    macs, params = COSTS.macs_and_params(arch)
    return Candidate(arch, {"macs": macs, "params": params}, 0.3, 0.8, random.Random(str(arch)).uniform(1, 2))


def trained(archs: list[Arch], noise: float = 0.002) -> list[TrainedNetwork]:
    rng = random.Random(7)
    return [TrainedNetwork(arch, candidate(arch).loss, quality(arch) + rng.gauss(0, noise)) for arch in archs]


def test_thirty_trainings_rank_networks_that_were_not_trained() -> None:
    correction = Correction(SPACE, trained(draw(30, 0)))
    others = [candidate(arch) for arch in draw(200, 1)]
    mean, deviation = correction.predict(others)
    truth = np.array([quality(c.arch) for c in others])
    assert kendalltau(mean, truth)[0] > 0.8
    assert 0.8 < np.mean(np.abs(mean - truth) < 2 * deviation) <= 1


def test_what_is_unlike_all_that_was_trained_is_uncertain() -> None:
    narrow = [arch for arch in draw(400, 0) if arch.operations[0].block_op.kernel == 0][:40]
    correction = Correction(SPACE, trained(narrow))
    known, unknown = (
        [candidate(arch) for arch in draw(300, 2) if (arch.operations[0].block_op.kernel == 0) is there]
        for there in (True, False)
    )
    assert correction.predict(known)[1].mean() < correction.predict(unknown)[1].mean()


def test_values_are_the_mean_and_with_hope_a_deviation_more() -> None:
    correction = Correction(SPACE, trained(draw(12, 0)))
    few = [candidate(arch) for arch in draw(5, 3)]
    mean, deviation = correction.predict(few)
    assert [c.value for c in correction.expected(few)] == mean.tolist()
    assert [c.value for c in correction.hopeful(few)] == (mean + deviation).tolist()
    assert [by_top1(c) for c in correction.expected(few)] == few
    assert by_loss(few[0]).quality == -few[0].loss
    assert correction.expected([]) == []


def test_too_little_to_learn_from() -> None:
    with pytest.raises(
        UserError, match="9 networks of this run are trained alone, and a correction learns from at least 10"
    ):
        Correction(SPACE, trained(draw(9, 0)))
    assert LEAST == 10
    same = [TrainedNetwork(arch, 1.0, 0.1) for arch in draw(12, 0)]
    with pytest.raises(
        UserError, match=r"all 12 networks that were trained alone have top-1 0.1000, so nothing to learn"
    ):
        Correction(SPACE, same)
