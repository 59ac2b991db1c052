"""The batched evaluator computes what a plain loop over the supernet computes."""

import weakref
from dataclasses import replace
from itertools import cycle
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bsnas.engine.evaluation import counting, evaluator, recalibration, walk
from bsnas.engine.evaluation import images as scored_images
from bsnas.engine.evaluation.evaluator import Evaluator, Score
from bsnas.engine.evaluation.folded import FoldedLayers
from bsnas.engine.evaluation.images import uploaded
from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.recalibration import StatisticsLayers
from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.evaluation.walk import Walker
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.sampling import fair_archs
from bsnas.engine.space.space import Space
from bsnas.kernels import graphs
from tests.engine.evaluation.cases import (
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
    monkeypatch.setattr(recalibration, "RECALIBRATION_BATCH", 16)
    monkeypatch.setattr(counting, "RECALIBRATION_PART", 5)
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
        scorer = Evaluator(nested, data, bn=bn, recalibration=training, memory_budget_mib=budget)
        scorer.memory = replace(scorer.memory, max_chunk=chunk)
        return scorer.evaluate(archs)

    expected = scores(None, 128)
    for budget, chunk in ((1, 128), (1, 7), (None, 13), (64, 64)):
        for a, b in zip(scores(budget, chunk), expected, strict=True):
            assert (a.correct1, a.correct5) == (b.correct1, b.correct5)
            assert a.loss == pytest.approx(b.loss, rel=1e-6)


@pytest.mark.parametrize("bn", ["running", "recalibrate"])
def test_out_of_memory_takes_smaller_pieces_and_goes_on(nested, bn, monkeypatch):
    data, training = random_images(70), random_images(32, seed=1)
    archs = archs_of(SPACES["full"], count=18)

    def new() -> Evaluator:
        return Evaluator(nested, data, bn=bn, recalibration=training)

    expected = new().evaluate(archs)
    layers = FoldedLayers if bn == "running" else StatisticsLayers
    block, limit, failures = layers.block, 24 if bn == "running" else 64, []
    out_of_memory = cycle(
        [
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("could not create a memory object"),
            MemoryError(),
        ]
    )

    def failing(self, level, step, nodes, x):
        if len(x) > limit:
            failures.append(len(x))
            raise next(out_of_memory)
        return block(self, level, step, nodes, x)

    monkeypatch.setattr(layers, "block", failing)
    scores = new().evaluate(archs)
    assert failures
    assert [(s.correct1, s.correct5, s.images) for s in scores] == [
        (s.correct1, s.correct5, s.images) for s in expected
    ]
    limit = 0
    with pytest.raises(UserError, match="does not fit in the memory"):
        new().evaluate(archs)


@pytest.mark.parametrize("bn", ["running", "recalibrate"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB."),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    ],
)
def test_a_gpu_gives_memory_back_when_the_failed_pass_is_gone(nested, bn, kind, message, monkeypatch):
    """An exception's traceback holds the tensors of the pass; emptied too soon, torch's cache keeps their memory."""
    for module in (evaluator, counting):
        monkeypatch.setattr(module, "worker_count", lambda device: 1)  # as on a GPU
    data, training, archs = random_images(70), random_images(32, seed=1), archs_of(SPACES["full"], count=18)
    expected = Evaluator(nested, data, bn=bn, recalibration=training).evaluate(archs)
    layers = FoldedLayers if bn == "running" else StatisticsLayers
    block, limit, held, emptied = layers.block, 24 if bn == "running" else 64, [], []

    def failing(self, level, step, nodes, x):
        if len(x) > limit:
            held.append(weakref.ref(x))
            raise kind(message)
        return block(self, level, step, nodes, x)

    monkeypatch.setattr(layers, "block", failing)
    scorer = Evaluator(nested, data, bn=bn, recalibration=training)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([tensor() is None for tensor in held]))
    scores = scorer.evaluate(archs)
    assert len(emptied) == len(held) > 0
    assert all(all(gone) for gone in emptied)
    assert [score[4:] for score in scores] == [score[4:] for score in expected], "right answers of all images"


def test_free_memory_of_a_gpu_counts_what_torch_keeps_for_later(monkeypatch):
    free = [10 << 30]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(64 << 30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 80 << 30))
    memory = Memory.plan(torch.device("cuda", 0), None, 1)
    assert memory.images == 8 << 30, "an eighth, in which ImageNet's 7.5 GB of images find room"
    assert Memory.plan(torch.device("cuda", 0), 4096, 1).images == 1 << 30, "a budget that is given is taken"


class FileImages(np.ndarray):
    """Images in a file: remembers how many are read into memory at once."""

    read: ClassVar[list[int]] = []

    def __getitem__(self, index):
        part = super().__getitem__(index)
        if isinstance(index, slice):
            self.read.append(len(part))
        return part


@pytest.mark.parametrize("count", [1, 64, 70])
def test_images_reach_a_gpu_in_slices(monkeypatch, count):
    images = random_images(count).images
    monkeypatch.setattr(scored_images, "UPLOAD_BYTES", 16 * images[0].nbytes + 5)
    monkeypatch.setattr(FileImages, "read", [])
    copied = uploaded(images.view(FileImages), torch.device("cpu"))
    assert copied.dtype == torch.uint8
    assert np.array_equal(copied.numpy(), images)
    assert FileImages.read == [16] * (count // 16) + ([count % 16] if count % 16 else [])


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """Graphs turned on; grows with each replay. Without a GPU a replay calls what was captured."""
    replayed = []

    def capture(run):
        results = []

        def replay() -> None:
            computed = run()
            replayed.append(1)
            if not results:  # a real capture computes nothing, and neither does this one before its first replay
                results.extend(computed)
            for result, value in zip(results, computed, strict=True):
                result.copy_(value)

        return results, replay

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "spare_memory", lambda: 1)
    monkeypatch.setattr(graphs, "why_not", lambda x, backend: None)
    monkeypatch.setattr(graphs, "_switch", True)
    for module in (evaluator, counting):
        monkeypatch.setattr(module, "worker_count", lambda device: 1)  # as on a GPU
    return replayed


@pytest.mark.parametrize("bn", ["running", "recalibrate"])
def test_graphs_score_as_launches_do(nested, bn, replays, monkeypatch):
    """Passes of scoring, and of recalibration, whose replays must add up statistics as launches do."""
    monkeypatch.setattr(recalibration, "RECALIBRATION_BATCH", 16)
    data, training, archs = random_images(90), random_images(80, seed=1), archs_of(SPACES["full"])

    def scores(on: bool) -> list[Score]:
        monkeypatch.setattr(graphs, "_switch", on)
        scorer = Evaluator(nested, data, bn=bn, recalibration=training)
        scorer.memory = replace(scorer.memory, max_chunk=16)
        return scorer.evaluate(archs)

    expected = scores(False)
    assert not replays
    assert scores(True) == expected
    assert len(replays) == (5 if bn == "running" else 9), "all chunks of 15 images and batches of 16 but the first"


def test_passes_whose_logits_are_too_many_are_launched(nested, replays):
    scorer, archs = Evaluator(nested, random_images(16)), archs_of(SPACES["full"])
    tree = PrefixTree(SPACES["full"], archs, 16)
    layers = FoldedLayers(nested, 16, torch.float32)
    layers.prepare(tree)
    needed = len(archs) * 16 * SPACES["full"].classes * 4
    for workspace, expected in ((needed, 2), (needed - 1, 0)):
        walker, memory = Walker(tree, layers), replace(scorer.memory, workspace=workspace)
        replays.clear()
        for _ in range(3):
            list(walker.walk(scorer.data.normalized(0, 16, torch.float32), memory))
        assert len(replays) == expected
    alive = weakref.ref(walker)
    del walker
    assert alive() is None, "buffers on a GPU must not wait for the garbage collector"


def test_graphs_that_cannot_run_say_why(nested, monkeypatch):
    monkeypatch.setattr(graphs, "_switch", True)
    with pytest.raises(RuntimeError, match="CUDA graphs cannot run: they need an NVIDIA GPU"):
        Evaluator(nested, random_images(4)).evaluate(archs_of(SPACES["full"], count=3))


def test_other_errors_are_not_taken_for_memory(nested, monkeypatch):
    def broken(self, level, step, nodes, x):
        raise RuntimeError("expected 3 channels")

    monkeypatch.setattr(FoldedLayers, "block", broken)
    with pytest.raises(RuntimeError, match="expected 3 channels"):
        Evaluator(nested, random_images(8)).evaluate(archs_of(SPACES["full"], count=3))


def test_peak_memory_stays_in_the_budget(nested, monkeypatch):
    """Outputs of nodes that are alive at once, those of leaves left out, against the activations part of a budget."""
    data = random_images(64)
    for module in (evaluator, counting):
        monkeypatch.setattr(module, "worker_count", lambda device: 1)  # the budget is divided among workers
    scorer = Evaluator(nested, data, memory_budget_mib=1)
    compute, held, peak = walk._compute, [0], [0]

    def released(size: int) -> None:
        held[0] -= size

    def watched(tree, layers, level, *arguments):
        outputs = compute(tree, layers, level, *arguments)
        if level + 1 < len(tree.levels):
            for output in outputs:
                held[0] += output.nbytes
                weakref.finalize(output, released, output.nbytes)
            peak[0] = max(peak[0], held[0])
        return outputs

    monkeypatch.setattr(walk, "_compute", watched)
    scorer.memory = replace(scorer.memory, max_chunk=64)
    scorer.evaluate(archs_of(SPACES["full"], count=72))
    assert 0 < peak[0] <= scorer.memory.activations
    assert held[0] == 0


def test_time_grows_less_than_the_number_of_models(nested):
    """In nodes, which are what costs: twice the models share the nodes that they have in common."""
    space = SPACES["shrunk"]
    nodes = [
        sum(len(level) for level in PrefixTree(space, archs_of(space, count), 16).levels) for count in (16, 32, 64)
    ]
    assert nodes[1] < 2 * nodes[0]
    assert nodes[2] < 2 * nodes[1]


def test_worker_threads_give_the_scores_of_one_and_leave_torch_as_it_was(nested):
    data, archs = random_images(50), archs_of(SPACES["full"], count=18)
    before = torch.get_num_threads()
    try:
        scores = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scores.append(Evaluator(nested, data).evaluate(archs))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert [s.correct1 for s in scores[0]] == [s.correct1 for s in scores[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bn": "frozen"}, "bn 'frozen' is unknown; allowed are running, recalibrate"),
        ({"bn": "recalibrate"}, "needs at least 2 training images"),
        ({"memory_budget_mib": 0}, "memory budget of 0 MiB is impossible; give at least 1"),
    ],
)
def test_bad_arguments_are_explained(nested, arguments, message):
    with pytest.raises(UserError, match=message):
        Evaluator(nested, random_images(4), **arguments)


def test_architectures_outside_the_space_and_empty_sets_are_refused(nested):
    outside = archs_of(SPACES["full"])[0]
    with pytest.raises(UserError, match="allowed are"):
        Evaluator(nested, random_images(4)).evaluate([replace(outside, channels=(99, *outside.channels[1:]))])
    with pytest.raises(UserError, match="the evaluation set has no images; give at least one"):
        Evaluator(nested, random_images(0))
    assert Evaluator(nested, random_images(4)).evaluate([]) == []


def test_progress_is_silent_without_a_terminal(nested, capfd):
    Evaluator(nested, random_images(8), progress=True).evaluate(archs_of(SPACES["full"], count=3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bn", ["running", "recalibrate"])
def test_real_graphs_score_as_launches_do(bn, monkeypatch):
    monkeypatch.setattr(recalibration, "RECALIBRATION_BATCH", 16)
    supernet = trained_like_supernet(SPACES["full"]).to("cuda")
    data, training, archs = random_images(90), random_images(80, seed=1), archs_of(SPACES["full"])
    scores = []
    for on in (False, True):
        monkeypatch.setattr(graphs, "_switch", on)
        scorer = Evaluator(supernet, data, process=Process.current(torch.device("cuda")), bn=bn, recalibration=training)
        scorer.memory = replace(scorer.memory, max_chunk=16)
        scores.append(scorer.evaluate(archs))
    assert scores[0] == scores[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_scores_equal_a_plain_loop():
    supernet = trained_like_supernet(SPACES["full"])
    data, archs = random_images(50), archs_of(SPACES["full"])
    expected = counts(loop_logits(supernet, data, archs), data.labels)
    supernet.to("cuda")
    for dtype, tolerance in ((torch.float32, 0), (torch.bfloat16, 3)):
        scores = Evaluator(supernet, data, process=Process.current(torch.device("cuda")), dtype=dtype).evaluate(archs)
        assert [s.correct1 for s in scores] == pytest.approx(expected, abs=tolerance)
