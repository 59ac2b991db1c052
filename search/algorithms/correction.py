"""A correction of one-shot scores, learned from networks that were trained alone, with its uncertainty.

A Gaussian process (scikit-learn's, squared-exponential kernel and noise) over what a network chooses in each block, its
one-shot loss, multiply-adds and parameters. Among networks of about equal multiply-adds, where one-shot scores tell
little apart, thirty trainings teach it more (docs/ranking.md); landmark regularisation (Yu et al., CVPR 2021) uses
trainings of a few networks likewise, in the training of the supernet.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import Candidate

LEAST = 10
"""Networks without which nothing is learned."""
Table = NDArray[np.float64]


@dataclass(frozen=True)
class TrainedNetwork:
    """A network that was trained alone, as long as all others that a correction learns from."""

    arch: Arch
    one_shot_loss: float
    top1: float
    """On the search-validation images."""


class Correction:
    """Predicts the top-1 of networks after such a training.

    Raises `UserError` for fewer than `LEAST` networks, or for ones that all came out alike.
    """

    def __init__(self, space: Space, networks: Sequence[TrainedNetwork]) -> None:
        if len(networks) < LEAST:
            raise UserError(
                f"{len(networks)} networks of this run are trained alone, and a correction learns from at least "
                f"{LEAST}; hold search/finals.py with more --networks or --random, or leave out --correction"
            )
        top1 = np.array([network.top1 for network in networks])
        if np.ptp(top1) == 0:
            raise UserError(
                f"all {len(networks)} networks that were trained alone have top-1 {top1[0]:.4f}, so nothing to learn; "
                "train them longer with search/finals.py --epochs, or leave out --correction"
            )
        self._space, self._costs = space, CostModel(space)
        self._scales = _scales(space)
        features = self._features((network.arch, network.one_shot_loss) for network in networks)
        self._mean, self._deviation = features.mean(0), features.std(0)
        choices = features.shape[1] - 3  # they lie between 0 and 1 and are left so, the three numbers are standardised
        self._mean[:choices], self._deviation[:choices] = 0, 0.5
        self._deviation[self._deviation == 0] = 1
        # Here: it takes a second of every search to import, and few have a correction.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

        kernel = ConstantKernel(1.0) * RBF(5.0) + WhiteKernel(0.1)
        self._process = GaussianProcessRegressor(kernel, normalize_y=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # at a bound of the kernel's settings
            self._process.fit((features - self._mean) / self._deviation, top1)

    def predict(self, candidates: Sequence[Candidate]) -> tuple[Table, Table]:
        """Mean and standard deviation of each one's top-1, noise included."""
        features = self._features((candidate.arch, candidate.loss) for candidate in candidates)
        mean, deviation = self._process.predict((features - self._mean) / self._deviation, return_std=True)
        return mean, deviation

    def expected(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with the predicted mean as their value."""
        return self._valued(candidates, 0)

    def hopeful(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """With mean plus deviation: what is little known is worth a look (upper confidence bound)."""
        return self._valued(candidates, 1)

    def _valued(self, candidates: Sequence[Candidate], deviations: float) -> list[Candidate]:
        if not candidates:
            return []
        mean, deviation = self.predict(candidates)
        values = (mean + deviations * deviation).tolist()
        return [replace(candidate, value=value) for candidate, value in zip(candidates, values, strict=True)]

    def _features(self, networks: Iterable[tuple[Arch, float]]) -> Table:
        """[networks, choices + 3]: choices from 0 to 1, one-shot loss, the logarithms of MACs and parameters."""
        rows = []
        for arch, loss in networks:
            choices = [
                (value - low) / (high - low)
                for i, op in enumerate(arch.operations)
                for value, (low, high) in zip(_numbers(op), self._scales[i], strict=True)
                if high > low
            ]
            macs, params = self._costs.macs_and_params(arch)
            rows.append([*choices, loss, math.log(macs), math.log(params)])
        return np.array(rows)


def _numbers(op: Operation) -> tuple[float, ...]:
    """What an operation is in numbers; sizes by their logarithm."""
    choice = op.block_op
    return (
        float(choice.kernel > 0), float(choice.kernel), math.log1p(choice.expansion), math.log1p(choice.width),
        float(choice.activation == "m"), math.log(op.channels),
    )  # fmt: skip


def _scales(space: Space) -> list[list[tuple[float, float]]]:
    """Per block the least and most of each of `_numbers` among its live operations."""
    return [[(min(column), max(column)) for column in zip(*map(_numbers, ops), strict=True)] for ops in space.live]
