"""From timed parts to whole networks: which correction of the sum predicts best, and how far it is off.

Every form of correction gives each part a cost and the network a constant: latency = offset + sum of costs. So any of
them is a sum over blocks, which the search can sample without rejection. Forms, from stiff to supple:

    sum        the parts as timed
    offset     plus a constant: what a call costs
    scale      times a factor
    affine     both
    parts R    both, and a factor of its own per part, held near the common one with strength R (ridge)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the ridge; noise of 1 % on networks and factors that differ by 5 % would make 0.04 right."""
_FOLDS = 5
_STIFF = 1e9
"""Ridge strength that holds a factor fixed."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """A form of correction: what of it is free, and how freely parts may have factors of their own."""

    name: str
    offset: bool
    scale: bool
    strength: float = _STIFF

    def fit(self, values: Floats, counts: Floats, latencies: Floats) -> tuple[float, Floats]:
        """Constant and factor of every part, by least squares of the relative error.

        Args:
            values: timed cost of every part [P].
            counts: how often each network has each part [N, P].
            latencies: of the networks [N].
        """
        shares = counts * values / latencies[:, None]
        columns = np.column_stack([1 / latencies, shares.sum(1), shares])
        # Unknowns: constant in units of the mean latency, change of the common factor, change of each part's own.
        columns[:, 0] *= latencies.mean()
        holds = np.full(columns.shape[1], self.strength)
        holds[0], holds[1] = (1e-12 if free else _STIFF for free in (self.offset, self.scale))
        system = np.vstack([columns, np.diag(np.sqrt(holds))])
        wanted = np.concatenate([1 - shares.sum(1), np.zeros(len(holds))])
        offset, scale, *own = np.linalg.lstsq(system, wanted, rcond=None)[0]
        return float(offset * latencies.mean()), 1 + scale + np.array(own)


FORMS = (
    Form("sum", offset=False, scale=False),
    Form("offset", offset=True, scale=False),
    Form("scale", offset=False, scale=True),
    Form("affine", offset=True, scale=True),
    *(Form(f"parts {strength:g}", offset=True, scale=True, strength=strength) for strength in _STRENGTHS),
)


@dataclass(frozen=True)
class Errors:
    """How far predictions are off on networks that were not used to fit them; shares, not percent."""

    mape: float
    """Mean absolute relative error."""
    max_error: float
    """Largest absolute relative error."""
    kendall_tau: float
    held_out: int
    """Networks."""


def cross_validated(values: Floats, counts: Floats, latencies: Floats) -> dict[str, float]:
    """Mean absolute relative error of every form on networks left out of its fit in turn."""
    errors = {}
    for form in FORMS:
        off = np.zeros(len(latencies))
        for fold in range(_FOLDS):
            out = np.arange(len(latencies)) % _FOLDS == fold
            offset, factors = form.fit(values, counts[~out], latencies[~out])
            off[out] = np.abs((offset + counts[out] @ (values * factors)) / latencies[out] - 1)
        errors[form.name] = float(off.mean())
    return errors


def best_fit(values: Floats, counts: Floats, latencies: Floats) -> tuple[str, float, Floats, dict[str, float]]:
    """Name of the form with the least cross-validated error, its constant, cost of every part, and all errors."""
    errors = cross_validated(values, counts, latencies)
    form = min(FORMS, key=lambda form: errors[form.name])
    offset, factors = form.fit(values, counts, latencies)
    return form.name, offset, np.maximum(values * factors, 0), errors


def errors_of(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Errors of predictions for networks measured whole."""
    relative = np.abs(np.array(predicted) / np.array(measured) - 1)
    return Errors(float(relative.mean()), float(relative.max()), kendall_tau(predicted, measured), len(measured))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: agreement of two rankings, from -1 to 1; 0 when one of them is all ties."""
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (np.array(first), np.array(second)))
    ties = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / ties if ties else 0.0


def part_counts(networks: Sequence[Sequence[str]], parts: Mapping[str, int]) -> Floats:
    """How often each network has each part [N, P]; `parts` maps a part to its column."""
    counts = np.zeros((len(networks), len(parts)))
    for row, network in enumerate(networks):
        for part in network:
            counts[row, parts[part]] += 1
    return counts
