"""The result does not depend on the number of ranks."""

import multiprocessing
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from bsnas.engine.evaluation.evaluator import Evaluator, Score
from bsnas.engine.evaluation.store import EvaluationStore
from bsnas.engine.space.sampling import fair_archs
from tests.engine.evaluation.cases import random_images, small_space, trained_like_supernet

ARCHS = list(dict.fromkeys(fair_archs(small_space(), seed=3, count=18)))


def scores(store: Path | None = None) -> list[list[Score]]:
    """Running and recalibrated scores; 37 images and 3 batches divide evenly over no number of ranks."""
    supernet, data, training = trained_like_supernet(small_space()), random_images(37), random_images(384, seed=1)
    return [
        Evaluator(supernet, data, store=store, **arguments).evaluate(ARCHS)
        for arguments in ({}, {"bn": "recalibrate", "recalibration": training})
    ]


def run_rank(rank: int, world: int, directory: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world)
    torch.save(scores(directory / "evaluations.sqlite"), directory / f"{rank}.pt")
    dist.barrier()
    again = scores(directory / "evaluations.sqlite")  # all from the file, which only rank 0 reads
    assert again == torch.load(directory / f"{rank}.pt", weights_only=False)
    dist.destroy_process_group()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("world", [2])
def test_ranks_give_exactly_the_counts_of_one(world, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "bsnas.engine.evaluation.evaluator", "tests.engine.evaluation.cases"])
    ranks = [context.Process(target=run_rank, args=(rank, world, tmp_path)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    expected = scores()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    for rank in range(world):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for a, b in zip(chain(*got), chain(*expected), strict=True):
            assert (a.images, a.correct1, a.correct5) == (b.images, b.correct1, b.correct5)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)
    rows = EvaluationStore(tmp_path / "evaluations.sqlite")._database.execute("SELECT seen FROM evaluations").fetchall()
    assert rows == [(37,)] * 2 * len(ARCHS)
