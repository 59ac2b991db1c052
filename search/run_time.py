"""How long training and shrinking a supernet takes on this machine, from a few passes over random images."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from bsnas.engine.config import RunConfig
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.host.distributed import Process
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.sampling import fair_archs

_BATCH = 32
"""Images of a timed pass; a training's larger batches take as long per image."""
_PASSES = 6
_SCORED_IMAGES = 128
_SUBNETS = 40
_VALIDATION_SHARE = 0.1
"""Search-validation images as a share of the training images."""


class RunTime(NamedTuple):
    parameters: int
    """Of the supernet."""
    training_seconds: float
    scoring_seconds: float
    models: int
    """Subnets that all shrink steps score together, while no operation is dropped: an upper bound."""


@dataclass(frozen=True)
class _RandomImages:
    images: np.ndarray
    labels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str = "random images"


def estimate(config: RunConfig, images: int) -> RunTime:
    """What a run of a configuration on so many training images takes here, on the CPU or the first GPU."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(config.seed)
    supernet = Supernet(config.space, config.sharing).to(device)
    schedule = config.shrink
    models = len(schedule.keep) * schedule.models(config.space.max_live)
    per_image = _seconds_per_image(supernet, device)
    scoring = models * images * _VALIDATION_SHARE * _seconds_per_answer(supernet, config, device) if models else 0.0
    parameters = sum(parameter.numel() for parameter in supernet.parameters())
    return RunTime(parameters, schedule.total_epochs * images * per_image, scoring, models)


def _seconds_per_image(supernet: Supernet, device: torch.device) -> float:
    """Of a forward and a backward pass through random paths."""
    space = supernet.train().space
    x = torch.randn(_BATCH, space.input_channels, space.resolution, space.resolution, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(_BATCH, dtype=torch.int64, device=device)
    archs = fair_archs(space, 0, _PASSES)
    for arch in (archs[0], *archs):
        if arch is archs[0]:
            started = time.perf_counter()  # the first pass, which compiles and allocates, is made twice
        F.cross_entropy(supernet(x, arch).float(), labels).backward()
        supernet.zero_grad(set_to_none=True)
    _wait(device)
    return (time.perf_counter() - started) / (_BATCH * _PASSES)


def _seconds_per_answer(supernet: Supernet, config: RunConfig, device: torch.device) -> float:
    """Of one subnet on one image, in the batched evaluator."""
    space, rng = supernet.eval().space, np.random.default_rng(0)
    shape = (_SCORED_IMAGES, space.resolution, space.resolution, space.input_channels)
    mean, std = config.data.scale
    images = _RandomImages(rng.integers(0, 256, shape, dtype=np.uint8), np.zeros(_SCORED_IMAGES, np.int64), mean, std)
    evaluator = Evaluator(supernet, images, process=Process.current(device), progress=False)
    archs = list(dict.fromkeys(fair_archs(space, 0, _SUBNETS)))
    started = time.perf_counter()
    evaluator.evaluate(archs)
    _wait(device)
    return (time.perf_counter() - started) / (len(archs) * _SCORED_IMAGES)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
