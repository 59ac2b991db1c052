"""Timing and checking one case of the evaluation benchmark."""

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from rich.console import Console
from scipy.stats import kendalltau
from torch import Tensor, nn

from bsnas.benchmarks.parts.scoring.case import ImageArrays
from bsnas.benchmarks.parts.scoring.contenders import (
    EagerPath,
    cached_images,
    recalibrate_alone,
    score_cached,
    score_through_loader,
)
from bsnas.engine.evaluation.early_decisions import Quotas
from bsnas.engine.evaluation.evaluator import Evaluator, Score
from bsnas.engine.evaluation.recalibration import recalibration_batch
from bsnas.engine.host.distributed import Process
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.sampling import fair_archs
from bsnas.engine.space.shrink import importance, shrink

TIE = 1e-4
"""Logits closer than this may swap places when sums are rounded differently."""
CONFIDENCE = 0.999


class Settings(Protocol):
    """The options of the script that one case needs."""

    @property
    def repeats(self) -> int: ...
    @property
    def sequential_models(self) -> int: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def early(self) -> bool: ...
    @property
    def memory_mib(self) -> int | None: ...


@dataclass(frozen=True, eq=False)
class Case:
    """What is scored."""

    space: str
    models: int
    supernet: Supernet
    data: ImageArrays
    recalibration: ImageArrays | None
    device: torch.device

    def archs(self) -> list[Arch]:
        """The first different fair-sampled architectures."""
        drawn = dict.fromkeys(fair_archs(self.supernet.space, seed=1, count=2 * self.models))
        return list(drawn)[: self.models]

    def evaluator(self, settings: Settings, **options: Any) -> Evaluator:
        """A fresh one, that knows no scores."""
        budget = settings.memory_mib
        return Evaluator(
            self.supernet, self.data, process=Process.current(self.device), memory_budget_mib=budget, **options
        )


def measure_case(case: Case, settings: Settings, console: Console) -> dict[str, Any]:
    """One row of figures."""
    archs = case.archs()
    row: dict[str, Any] = {"space": case.space, "models": len(archs), "images": len(case.data.labels)}
    count = min(settings.sequential_models or len(archs), len(archs))
    sample = [archs[i * len(archs) // count] for i in range(count)]
    sequential = [EagerPath(case.supernet, arch).eval() for arch in sample]
    best_dtype, cached = _best_eager_images(case, sequential[0])
    best_eager = [_channels_last(network, best_dtype) for network in sequential]
    score_through_loader(sequential[0], case.data, case.device)
    times: dict[str, list[float]] = {"ours": [], "sequential": [], "best_eager": []}
    scores: list[Score] = []
    in_bf16: list[Score] = []
    if settings.bf16:
        times["ours_bf16"] = []
    logits: list[Tensor] = []
    with peak_memory(case.device) as peak:
        row["first_s"], scores = _timed(case.device, lambda: case.evaluator(settings).evaluate(archs))
    row["peak_memory_mib"] = peak[0]
    for _ in range(settings.repeats):
        seconds, scores = _timed(case.device, lambda: case.evaluator(settings).evaluate(archs))
        times["ours"].append(seconds)
        seconds, logits = _timed(
            case.device, lambda: [score_through_loader(network, case.data, case.device) for network in sequential]
        )
        times["sequential"].append(seconds / count * len(archs))
        seconds, _ = _timed(case.device, lambda: [score_cached(network, cached) for network in best_eager])
        times["best_eager"].append(seconds / count * len(archs))
        if settings.bf16:
            bf16 = case.evaluator(settings, dtype=torch.bfloat16)
            seconds, in_bf16 = _timed(case.device, partial(bf16.evaluate, archs))
            times["ours_bf16"].append(seconds)
        console.print("  " + ", ".join(f"{name} {values[-1]:.1f} s" for name, values in times.items()))
    row |= {f"{name}_s": median(values) for name, values in times.items()}
    row["model_images_per_s"] = len(archs) * row["images"] / row["ours_s"]
    row["speedup_vs_sequential"] = _ratio(times["sequential"], times["ours"])
    row["speedup_vs_best_eager"] = _ratio(times["best_eager"], times["ours"])
    row["speedups_by_repeat"] = [
        [round(a / ours, 2), round(b / ours, 2)]
        for ours, a, b in zip(times["ours"], times["sequential"], times["best_eager"], strict=True)
    ]
    row["sequential_models"], row["best_eager_dtype"] = count, str(best_dtype).removeprefix("torch.")
    by_arch = dict(zip(archs, scores, strict=True))
    row |= compare(logits, case.data.labels, [by_arch[arch] for arch in sample])
    row["median_top1"] = median(score.top1 for score in scores)
    if settings.bf16:
        row["bf16_speedup_vs_sequential"] = _ratio(times["sequential"], times["ours_bf16"])
        row["bf16_speedup_vs_best_eager"] = _ratio(times["best_eager"], times["ours_bf16"])
        row["bf16_kendall_tau"] = tau([s.top1 for s in scores], [s.top1 for s in in_bf16])
    if settings.early:
        row |= _measure_early(case, settings, archs, scores, row["ours_s"])
    if case.recalibration is not None:
        row |= _measure_recalibration(case, case.recalibration, settings, archs, sample[:4])
    return row


def compare(logits: Sequence[Tensor], labels: np.ndarray, scores: Sequence[Score]) -> dict[str, Any]:
    """Counts of (a) against ours, model by model; differences that ties of logits explain are counted apart."""
    right = torch.from_numpy(labels)
    theirs, ties = [], []
    for each in logits:
        top = each.float().cpu().topk(2, dim=1)
        theirs.append(int((top.indices[:, 0] == right).sum()))
        ties.append(int((top.values[:, 0] - top.values[:, 1] < TIE).sum()))
    ours = [score.correct1 for score in scores]
    differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    return {
        "count_mismatches": sum(max(0, d - tie) for d, tie in zip(differences, ties, strict=True)),
        "count_differences": sum(differences),
        "ties": sum(ties),
        "kendall_tau": tau(theirs, ours),
    }


def tau(a: Sequence[float], b: Sequence[float]) -> float:
    return 1.0 if len(set(a)) == 1 and list(a) == list(b) else float(kendalltau(a, b).statistic)


def _measure_early(
    case: Case, settings: Settings, archs: Sequence[Arch], scores: Sequence[Score], full_s: float
) -> dict[str, Any]:
    """Thirds at 99.9 %, against the full evaluation: what it saves, and what a shrink step would keep."""
    third = len(archs) // 3
    quotas = Quotas(best=third, worst=third)
    seconds, placement = _timed(
        case.device, lambda: case.evaluator(settings).place(archs, quotas, confidence=CONFIDENCE)
    )
    top1 = [score.top1 for score in scores]
    space = case.supernet.space
    keep = -(-space.max_live // 2)
    exact = shrink(space, importance(space, archs, top1), keep)
    early = shrink(space, importance(space, archs, placement.ranks), keep)
    same = [set(a) == set(b) for a, b in zip(exact.live, early.live, strict=True)]
    return {
        "early_speedup": full_s / seconds,
        "early_images_saved": placement.images_saved,
        "early_places_differing": placement.differing(top1, quotas),
        "early_blocks_kept_equal": sum(same) / len(same),
    }


def _measure_recalibration(
    case: Case, images: ImageArrays, settings: Settings, archs: Sequence[Arch], sample: Sequence[Arch]
) -> dict[str, Any]:
    """Against recalibrating each subnet alone on the same images, then scoring it as (a) does."""
    evaluator = case.evaluator(settings, bn="recalibrate", recalibration=images)
    seconds, scores = _timed(case.device, lambda: evaluator.evaluate(archs))

    def alone() -> list[Tensor]:
        logits = []
        for arch in sample:
            network = EagerPath(case.supernet, arch)
            recalibrate_alone(network, images, recalibration_batch(len(images.labels)), case.device)
            logits.append(score_through_loader(network, case.data, case.device))
        return logits

    alone_seconds, logits = _timed(case.device, alone)
    by_arch = dict(zip(archs, scores, strict=True))
    agreement = compare(logits, case.data.labels, [by_arch[arch] for arch in sample])
    return {
        "recalibrated_s": seconds,
        "recalibrated_speedup": alone_seconds / len(sample) * len(archs) / seconds,
        "recalibrated_count_mismatches": agreement["count_mismatches"],
        "recalibrated_count_differences": agreement["count_differences"],
        "recalibrated_median_top1": median(score.top1 for score in scores),
    }


def _best_eager_images(case: Case, network: nn.Module) -> tuple[torch.dtype, Tensor]:
    """The faster dtype of contender (b) on this device, and the images in it."""
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        converted = _channels_last(network, dtype)
        few = cached_images(case.data.first(128), case.device, dtype)
        score_cached(converted, few)
        seconds[dtype] = min(_timed(case.device, partial(score_cached, converted, few))[0] for _ in range(3))
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest, cached_images(case.data, case.device, fastest)


def _channels_last(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in that dtype and layout."""
    return copy.deepcopy(network).to(dtype=dtype).to(memory_format=torch.channels_last)


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """MiB that the work inside took at most, on top of what was in use before; in the list when it is done."""
    peak = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return
    process, stop = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], (process.memory_info().rss - before) / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
