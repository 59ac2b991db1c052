"""Deciding early which architectures are among the best and among the worst, from the images seen so far.

Two architectures that answer the same images are compared image by image. Of n images, one alone was right on `a`, the
other alone on `b`. The n images are a random part of all N, so the difference on all of them is about normal around
(a - b) / n, with variance s^2 / n * (1 - n / N), where s^2 is the variance of the difference on one image. When that
leaves a chance below 1 - confidence for the other order, the first is *certainly better*. An architecture's place is
certain when enough others are certainly better or worse. The chance is divided by the number of looks, not by the
number of comparisons: only those near the border decide.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from statistics import NormalDist

import numpy as np

from bsnas.engine.evaluation.store import Tally
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch

FEWEST_IMAGES = 64
"""Below this, the normal approximation of so few differing answers is not to be trusted."""


class Place(Enum):
    BEST = "best"
    MIDDLE = "middle"
    WORST = "worst"


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """How many of the architectures are called the best, and how many the worst."""

    best: int
    worst: int = 0

    def check(self, archs: int) -> None:
        """Raise `UserError` unless both fit into so many architectures."""
        if min(self.best, self.worst) < 0 or self.best + self.worst > archs:
            raise UserError(
                f"the best {self.best} and the worst {self.worst} of {archs} architectures are asked for; "
                "give two numbers from 0 whose sum is at most the number of architectures"
            )


@dataclass(frozen=True)
class Placement:
    """Where architectures ended up, in the order in which they were given."""

    places: list[Place]
    order: list[int]
    """All positions from the best to the worst: decided places first, then by top-1 on the images seen."""
    images_seen: list[int]
    top1: list[float]
    """On the images seen."""
    images_saved: float
    """Share of all model-images that were not needed."""

    def differing(self, top1: Sequence[float], quotas: Quotas) -> int:
        """How many places differ from those that a full evaluation gives."""
        full = places_of(sorted(range(len(top1)), key=lambda i: -top1[i]), quotas)
        return sum(mine != theirs for mine, theirs in zip(self.places, full, strict=True))

    @property
    def ranks(self) -> list[int]:
        """Per architecture a number that is larger the better it is placed: for whoever sorts by top-1."""
        ranks = [0] * len(self.order)
        for rank, i in enumerate(reversed(self.order)):
            ranks[i] = rank
        return ranks


def places_of(order: Sequence[int], quotas: Quotas) -> list[Place]:
    """The place of every architecture when all are ordered from the best to the worst."""
    places = [Place.MIDDLE] * len(order)
    for rank, i in enumerate(order):
        if rank < quotas.best:
            places[i] = Place.BEST
        elif rank >= len(order) - quotas.worst:
            places[i] = Place.WORST
    return places


class PairedComparisons:
    """For every two of A architectures, on how many images they both saw each was right.

    `weights` [A] says how often an architecture counts (a set may hold it several times).
    """

    def __init__(self, archs: int, images: int, weights: Sequence[int]) -> None:
        self.images = images
        self.weights = np.array(weights, np.float32)
        self.seen = np.zeros(archs, np.int64)
        self.right = np.zeros(archs, np.int64)
        self._right = np.zeros((archs, archs), np.float32)
        """[i, j]: how often i was right on the images that i and j both saw."""
        self._both = np.zeros((archs, archs), np.float32)
        """[i, j]: how often i and j were both right."""

    def add(self, archs: Sequence[int], answers: np.ndarray) -> None:
        """Right or wrong answers, bool [archs, n], of some architectures to the next n images."""
        chosen = np.array(archs)
        block = np.ix_(chosen, chosen)
        right = answers.astype(np.float32)
        self._right[block] += right.sum(1)[:, None]
        self._both[block] += right @ right.T
        self.seen[chosen] += answers.shape[1]
        self.right[chosen] += answers.sum(1)

    def certain_places(self, archs: Sequence[int], quotas: Quotas, chance: float) -> dict[int, Place]:
        """The certain places of some architectures; `chance` is what a comparison may be wrong with."""
        z = NormalDist().inv_cdf(1 - chance)
        total = float(self.weights.sum())
        decided: dict[int, Place] = {}
        for i in archs:
            if self.seen[i] < FEWEST_IMAGES:
                continue
            better, worse = self._certain_weights(i, z)
            if total - worse <= quotas.best:
                decided[i] = Place.BEST
            elif total - better <= quotas.worst:
                decided[i] = Place.WORST
            elif better >= quotas.best and worse >= quotas.worst:
                decided[i] = Place.MIDDLE
        return decided

    def _certain_weights(self, i: int, z: float) -> tuple[float, float]:
        """How many architectures are certainly better than i, and how many certainly worse."""
        n = np.minimum(self.seen, self.seen[i]).clip(1)
        alone, other = self._right[i] - self._both[i], self._right[:, i] - self._both[i]
        difference = (alone - other) / n
        # One differing answer is added, so that architectures which never differed are not certainly equal.
        variance = (alone + other + 1) / n - difference**2
        error = np.sqrt(variance.clip(0) / n * (1 - n / self.images))
        comparable = n >= FEWEST_IMAGES
        worse = comparable & (difference > z * error) & (difference > 0)
        better = comparable & (-difference > z * error) & (difference < 0)
        return float(self.weights[better].sum()), float(self.weights[worse].sum())


LOOKS = 20
"""How often an evaluation pauses to decide; each time costs a comparison of all with all."""


def place_early(
    archs: Sequence[Arch],
    quotas: Quotas,
    confidence: float,
    images: int,
    tallies: Mapping[Arch, Tally],
    run: Callable[[Sequence[Arch], int, int], None],
) -> Placement:
    """Evaluate architectures look by look until every place is certain or all images are seen.

    `run(archs, start, stop)` adds images start..stop-1 to the tallies of architectures that saw the `start` before.
    What tallies hold already is used, so a call that was killed decides the same again without running it.
    """
    copies = Counter(archs)
    distinct = list(copies)
    comparisons = PairedComparisons(len(distinct), images, [copies[arch] for arch in distinct])
    decided: dict[int, Place] = {}
    undecided = list(range(len(distinct)))
    for start, stop in pairwise(sorted({images * look // LOOKS for look in range(LOOKS + 1)})):
        behind: dict[int, list[Arch]] = {}
        for i in undecided:
            if tallies[distinct[i]].seen < stop:
                behind.setdefault(tallies[distinct[i]].seen, []).append(distinct[i])
        for first, group in sorted(behind.items()):
            run(group, first, stop)
        comparisons.add(undecided, np.stack([tallies[distinct[i]].answers[start:stop] for i in undecided]))
        decided |= comparisons.certain_places(undecided, quotas, (1 - confidence) / LOOKS)
        undecided = [i for i in undecided if i not in decided]
        if not undecided:
            break
    position = {arch: i for i, arch in enumerate(distinct)}
    members = [position[arch] for arch in archs]
    top1 = comparisons.right / comparisons.seen
    order = _order(members, quotas, top1, decided)
    seen = [int(comparisons.seen[i]) for i in members]
    saved = 1 - sum(seen) / (len(archs) * images)
    return Placement(places_of(order, quotas), order, seen, [float(top1[i]) for i in members], saved)


def _order(members: Sequence[int], quotas: Quotas, top1: np.ndarray, decided: Mapping[int, Place]) -> list[int]:
    """Positions of `members` (which architecture each is) from the best to the worst.

    The undecided saw all images; by their top-1 they take the places that are free among the best and the worst.
    """
    ranked = sorted(range(len(members)), key=lambda i: -top1[members[i]])
    best, undecided, middle, worst = (
        [i for i in ranked if decided.get(members[i]) is place]
        for place in (Place.BEST, None, Place.MIDDLE, Place.WORST)
    )
    promoted = max(quotas.best - len(best), 0)
    demoted = min(max(quotas.worst - len(worst), 0), max(len(undecided) - promoted, 0))
    rest = len(undecided) - demoted
    return [*best, *undecided[:promoted], *middle, *undecided[promoted:rest], *undecided[rest:], *worst]
