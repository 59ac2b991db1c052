"""Timing parts of networks and whole networks on a backend, against a reference network timed in the same moments.

A machine that others use slows down for seconds at a time, by a factor of two and more. Timed in turn with a reference,
network and reference slow down together and their ratio stays: on two busy cores repeated ratios differed by 1 to 5 %
where repeated times differed by 60 %.
"""

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.onnx import Precision
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import fair_archs
from bsnas.engine.space.space import Space
from bsnas.search.backends import Backend, Model, Session
from bsnas.search.backends.timing import interleaved_ms
from bsnas.search.latency_tables.network_parts import Part, PartTable
from bsnas.search.latency_tables.part_stacks import stack, unit_scale
from bsnas.search.latency_tables.timings import LatencyContext, Timing

_COPIES = 4
"""Copies of a part by which its longer stack exceeds its shorter one."""
_NETWORK_CALLS = 3
"""Calls of a visit to a whole network; a group's only reference must not bring its own noise into all of them."""


class LatencyBench:
    """Times things of one space on one backend, at one batch size and precision.

    Raises `CannotRun` when the backend, or this precision on it, does not run here.
    """

    group = 12
    """Whole networks that are timed in turn."""

    def __init__(
        self,
        space: Space,
        backend: Backend,
        *,
        batch: int,
        precision: Precision,
        visits: int = 100,
        max_seconds: float = 2.0,
        seed: int = 0,
    ) -> None:
        self.space = space.full()
        self.parts = PartTable(space)
        self._backend, self._batch, self._precision = backend, batch, precision
        self._visits, self._max_seconds = visits, max_seconds
        self._rng = random.Random(seed)
        hardware = backend.describe()
        reference = middle_arch(self.space)
        self._reference = self._open(unit_scale(Subnet(self.space, reference)), self._input_shape)
        self.context = LatencyContext(
            backend=backend.name,
            **hardware._asdict(),
            batch=batch,
            precision=precision,
            reference=f"{reference} in {self.space.fingerprint[:16]}",
        )

    @property
    def _input_shape(self) -> tuple[int, int, int]:
        return self.space.input_channels, self.space.resolution, self.space.resolution

    def part(self, part: Part) -> Timing:
        """One copy of a part: what four more copies in a stack add, divided by four."""
        short, long = (self._open(stack(part, n), part.input_shape) for n in (1, 1 + _COPIES))
        times = self._times([short, long, self._reference], 1, self._max_seconds)
        return _timing((times[:, 1] - times[:, 0]) / _COPIES, times[:, 2])

    def networks(self, archs: Sequence[Arch]) -> dict[Arch, Timing]:
        """Whole released networks with random weights, timed in turn; at most `group` at a time."""
        sessions = [self._open(unit_scale(Subnet(self.space, arch)), self._input_shape) for arch in archs]
        times = self._times([*sessions, self._reference], _NETWORK_CALLS, self._max_seconds * len(sessions))
        return {arch: _timing(times[:, k], times[:, -1]) for k, arch in enumerate(archs)}

    def _times(self, sessions: Sequence[Session], calls: int, max_seconds: float) -> np.ndarray:
        return interleaved_ms(sessions, visits=self._visits, calls=calls, max_seconds=max_seconds, rng=self._rng)

    def _open(self, network: nn.Module, shape: tuple[int, int, int]) -> Session:
        channels, resolution, _ = shape
        with TemporaryDirectory() as directory:
            model = Model("timed", network, resolution, Path(directory), channels=channels, plain=True)
            session = self._backend.open(model, self._precision, self._batch)
        session.load(torch.randn(self._batch, *shape))
        return session


def middle_arch(space: Space) -> Arch:
    """The architecture of the first fair-sampled ones whose MACs are their median."""
    archs = sorted(fair_archs(space, 0, 2 * space.max_live + 1), key=CostModel(space).macs)
    return archs[len(archs) // 2]


def base_ms(timings: Sequence[Timing]) -> float:
    """What the reference takes when the machine is quiet: near the lowest of what it took beside each timing."""
    times = [timing.reference_ms for timing in timings]
    return min(times) if len(times) < 10 else statistics.quantiles(times, n=10)[0]


def _timing(times: np.ndarray, reference: np.ndarray) -> Timing:
    ratios = times / reference
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return Timing(float(middle), float(high - low), len(ratios), float(np.median(reference)))
