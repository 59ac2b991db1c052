"""Random architectures that keep limits, without rejecting nearly everything.

Limits far from the bulk of a space make rejection sampling hopeless: of ten thousand random architectures of Table 1
not one has less than 250 M MACs. Here the costs that are sums over blocks are put on a grid, and dynamic programming
from the last block to the first finds the probability that the blocks still to come add exactly so many grid cells.
Walking forwards, each choice is then drawn with the probability that it ends in the wanted cell. A limit on a cost that
is the largest of its blocks' needs no grid: it rules out choices one by one.

What is drawn: a cell of the first limited sum, uniformly among those that the limits leave, so that samples spread
over the whole feasible range and do not pile up where most architectures lie; and inside it what `uniform_arch` would
draw there. Terms are rounded to whole cells, so a draw may miss a limit by a few cells: callers check.
"""

import random
from functools import reduce
from itertools import accumulate, islice

import numpy as np
from numpy.typing import NDArray

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.cost import Cost, Place, links
from bsnas.engine.space.limits import Limit, check_reachable, unreachable
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space

Link = tuple[int, int]
"""The channels before and after a block."""
Terms = list[dict[Link, dict[BlockOp, float]]]
"""Per block and link, what each live choice adds."""
Cell = tuple[int, ...]
Mass = NDArray[np.float64]
"""Probability per grid cell, one axis per limited sum."""

_GRID_CELLS = 2**18
_DRAWS = 20
"""Draws for each wanted architecture."""
_MAX_AXIS_CELLS = 4096


def check_limits(problem: Problem) -> None:
    """Raise `UserError` with the reachable ranges when no architecture keeps the limits, up to the grid's rounding."""
    Sampler(problem)


def archs_inside(space: Space, limit: Limit, seed: int, count: int) -> list[Arch]:
    """Random architectures that keep a limit, equal for equal arguments.

    Raises `UserError` with the reachable range when there are none.
    """
    problem, rng = Problem.of(space, (limit,)), random.Random(f"{seed}/inside")
    sampler = Sampler(problem)
    drawn = (sampler.draw(rng) for _ in range(_DRAWS * count))
    archs = list(islice((arch for arch in drawn if problem.allows(arch)), count))
    if not archs:
        raise sampler.nothing_found()
    return archs


class Sampler:
    """Draws architectures that keep the limits of a problem, up to the rounding of the grid.

    Raises `UserError` with the reachable ranges when no architecture does.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        # Without limits on a search for a Pareto set, draws spread over the first minimised sum.
        limits = problem.limits or [Limit(cost) for cost in problem.minimised if problem.costs[cost].adds][:1]
        self._uniform = not limits
        if self._uniform:
            return
        self._peaks = [limit for limit in limits if not problem.costs[limit.cost].adds]
        self._sums = [limit for limit in limits if problem.costs[limit.cost].adds] or [Limit("macs")]
        """An axis of the grid each. Draws spread over the first, which is MACs if there is none."""
        self.ranges = {limit.cost: problem.costs[limit.cost].range() for limit in (*self._sums, *self._peaks)}
        """Smallest and largest value of every limited cost in the space."""
        check_reachable(limits, self.ranges)
        self._put_on_grid()
        self._fill_masses()
        self._list_targets()

    def draw(self, rng: random.Random) -> Arch:
        """One architecture; it keeps the limits up to a few grid cells."""
        if self._uniform:
            return uniform_arch(self.problem.space, rng)
        cells, weights = rng.choice(self._targets)
        return self._walk(rng.choices(cells, cum_weights=weights)[0], rng)

    def nothing_found(self) -> UserError:
        """The error for limits inside the reachable range that no architecture happens to keep."""
        return unreachable(self.problem.limits, self.ranges, "in this space, with gaps between")

    def _keeps_peaks(self, place: Place) -> bool:
        """Whether a block, with the tail if it is the last one, keeps every limit on a peak."""
        index, _, channels, _ = place
        last = index == self.problem.space.num_blocks - 1
        peaks = [(self.problem.costs[limit.cost], limit.high) for limit in self._peaks]
        return all(p.block(*place) <= high and not (last and p.tail(channels) > high) for p, high in peaks)

    def _put_on_grid(self) -> None:
        """Every term in whole cells, counted from the smallest term of its block."""
        space = self.problem.space
        costs = [counted_from_reference(self.problem.costs[limit.cost]) for limit in self._sums]
        lows = [[min(min(ops.values()) for ops in block.values()) for block in terms] for _, terms in costs]
        self._origin = [constant + sum(low) for (constant, _), low in zip(costs, lows, strict=True)]
        axis_cells = min(_MAX_AXIS_CELLS, int(_GRID_CELLS ** (1 / len(costs))))
        highs = [self.ranges[limit.cost][1] for limit in self._sums]
        self._cell_sizes = [
            max((high - origin) / axis_cells, 1e-9) for high, origin in zip(highs, self._origin, strict=True)
        ]
        self._slack = space.num_blocks // 2 + 1
        """Cells by which a sum can be off: every block rounds by at most half a cell."""
        self._shape = (axis_cells + 1 + self._slack,) * len(costs)

        self._steps: list[dict[Link, dict[BlockOp, Cell]]] = []
        for i in range(space.num_blocks):
            steps: dict[Link, dict[BlockOp, Cell]] = {}
            for link in links(space, i):
                steps[link] = {
                    op: tuple(
                        round((terms[i][link][op] - low[i]) / size)
                        for (_, terms), low, size in zip(costs, lows, self._cell_sizes, strict=True)
                    )
                    for op in space.live_block_ops(i, link[1])
                    if self._keeps_peaks((i, *link, op))
                }
            self._steps.append(steps)

    def _fill_masses(self) -> None:
        """Backwards over the blocks: per channels before the block, how likely the rest adds so many cells."""
        end = np.zeros(self._shape)
        end[(0,) * end.ndim] = 1
        last = self.problem.space.live_channels(len(self.problem.space.clusters) - 1)
        self._masses: list[dict[int, Mass]] = [dict.fromkeys(last, end)]
        for steps in reversed(self._steps):
            after = self._masses[0]
            masses: dict[int, Mass] = {}
            links_from: dict[int, int] = {}
            for (before, channels), choices in steps.items():
                if not choices or channels not in after:
                    continue
                mass = masses.setdefault(before, np.zeros(self._shape))
                links_from[before] = links_from.get(before, 0) + 1
                for step in choices.values():
                    _add_shifted(mass, after[channels], step, 1 / len(choices))
            for before, mass in masses.items():
                mass /= links_from[before]
            self._masses.insert(0, masses)

    def _list_targets(self) -> None:
        """The cells that the limits leave, in rows of equal first cost, with their cumulated masses."""
        if not self._masses[0]:
            raise unreachable(self.problem.limits, self.ranges, "in this space, each alone")
        (mass,) = self._masses[0].values()
        kept = [self._axis_inside(axis) for axis in range(mass.ndim)]
        wanted = np.where(reduce(np.multiply.outer, kept), mass, 0)
        if not wanted.any():
            raise self._none_inside(kept)
        self._targets: list[tuple[list[Cell], list[float]]] = []
        for row in np.flatnonzero(wanted.reshape(len(wanted), -1).any(axis=1)):
            cells = [(int(row), *map(int, rest)) for rest in np.argwhere(wanted[row] > 0)]
            self._targets.append((cells, list(accumulate(float(wanted[cell]) for cell in cells))))

    def _axis_values(self, axis: int) -> NDArray[np.floating]:
        """The cost at every cell of an axis."""
        return self._origin[axis] + self._cell_sizes[axis] * np.arange(self._shape[axis])

    def _axis_inside(self, axis: int) -> NDArray[np.bool_]:
        """Which cells of an axis can hold a cost inside its limit."""
        limit, values = self._sums[axis], self._axis_values(axis)
        slack = self._slack * self._cell_sizes[axis]
        return (values >= limit.low - slack) & (values <= limit.high + slack)

    def _none_inside(self, kept: list[NDArray[np.bool_]]) -> UserError:
        """The error for limits that can each be kept but not together, with what the other limits leave of each."""
        (mass,) = self._masses[0].values()
        reachable = {}
        for axis, limit in enumerate(self._sums):
            others = [np.ones_like(k) if a == axis else k for a, k in enumerate(kept)]
            there = np.where(reduce(np.multiply.outer, others), mass, 0)
            cells = np.flatnonzero(np.moveaxis(there, axis, 0).reshape(len(kept[axis]), -1).any(axis=1))
            if len(cells):
                low, high = self.ranges[limit.cost]
                values = np.clip(self._axis_values(axis)[cells], low, high)
                reachable[limit.cost] = (float(values[0]), float(values[-1]))
        if not reachable:
            return unreachable(self.problem.limits, self.ranges, "in this space, each alone")
        peaks = {limit.cost: self.ranges[limit.cost] for limit in self._peaks}
        return unreachable(self.problem.limits, {**reachable, **peaks}, "while the other limits are kept")

    def _walk(self, target: Cell, rng: random.Random) -> Arch:
        """An architecture whose steps add up to the target cell, each choice drawn by the mass behind it."""
        before, rest = self.problem.space.entry_channels, target
        channels: list[int] = []
        ops: list[list[BlockOp]] = []
        for i, steps in enumerate(self._steps):
            options = [
                (link[1], op, tuple(r - s for r, s in zip(rest, step, strict=True)), len(choices))
                for link, choices in steps.items()
                if link[0] == before and link[1] in self._masses[i + 1]
                for op, step in choices.items()
            ]
            masses = self._masses[i + 1]
            weights = [
                float(masses[width][cell]) / count if min(cell) >= 0 else 0.0 for width, _, cell, count in options
            ]
            before, op, rest, _ = rng.choices(options, weights)[0]
            if self.problem.space.is_first(i):
                channels.append(before)
                ops.append([])
            ops[-1].append(op)
        return Arch(tuple(channels), tuple(map(tuple, ops)))


def counted_from_reference(cost: Cost) -> tuple[float, Terms]:
    """An additive cost taken apart into that of a reference network, the first live choice everywhere, and terms.

    A term is what a choice adds to the network that goes on from it with the reference's choices. A block's own cost
    would do as well, but terms decide on the cells and so on what is drawn: a search that goes on must draw the same.
    """
    space = cost.space
    rest = {c: cost.tail(c) for c in space.live_channels(len(space.clusters) - 1)}
    """Of the reference's choices behind a block, per its channels."""
    terms: Terms = []
    for i in reversed(range(space.num_blocks)):
        after, rest = rest, {}
        terms.insert(0, {})
        for before, channels in links(space, i):
            ops = space.live_block_ops(i, channels)
            costs = {op: cost.block(i, before, channels, op) + after[channels] for op in ops}
            rest.setdefault(before, costs[ops[0]])  # of the first link: the reference's
            terms[0][before, channels] = {op: costs[op] - rest[before] for op in ops}
    return cost.constant + cost.stem + rest[space.entry_channels], terms


def _add_shifted(total: Mass, mass: Mass, step: Cell, factor: float) -> None:
    """Add to `total` the mass moved up by `step` cells; what leaves the grid is dropped."""
    if all(s < size for s, size in zip(step, mass.shape, strict=True)):
        target = tuple(slice(s, None) for s in step)
        source = tuple(slice(None, size - s) for s, size in zip(step, mass.shape, strict=True))
        total[target] += factor * mass[source]
