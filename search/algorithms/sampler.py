"""Random architectures that keep limits, without rejecting nearly everything.

Limits far from the bulk of a space make rejection sampling hopeless: of ten thousand random architectures of Table 1
not one has less than 250 M MACs. Here the costs, which are sums over blocks, are put on a grid, and dynamic programming
from the last block to the first finds the probability that the blocks still to come add exactly so many grid cells.
Walking forwards, each choice is then drawn with the probability that it ends in the wanted cell.

What is drawn: a cell of the first limited cost, uniformly among those that the limits leave, so that samples spread
over the whole feasible range and do not pile up where most architectures lie; and inside it what `uniform_arch` would
draw there. Terms are rounded to whole cells, so a draw may miss a limit by a few cells: callers check.
"""

import random
from collections.abc import Mapping
from functools import reduce
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Arch, BlockOp, Space
from bsnas.search.costs.chain import ChainCost, Link
from bsnas.search.costs.constraints import Constraints, Limit, infeasible

Cell = tuple[int, ...]
Mass = NDArray[np.float64]
"""Probability per grid cell, one axis per limited cost."""

_GRID_CELLS = 2**18
_MAX_AXIS_CELLS = 4096


class Sampler:
    """Draws architectures of a space that keep the constraints, up to the rounding of the grid.

    Raises `UserError` with the reachable ranges when no architecture keeps the limits.
    """

    def __init__(self, space: Space, constraints: Constraints) -> None:
        self.space = space
        self.constraints = constraints
        if not constraints.limits:
            return
        self._limits = tuple(limit for limit in constraints.limits if limit.cost not in constraints.peaks)
        """Limits on sums, an axis of the grid each. Draws spread over the first, which is MACs if there is none."""
        self._limits = self._limits or (Limit("macs"),)
        chains = [ChainCost(space, constraints.costs[limit.cost]) for limit in self._limits]
        self.ranges = {limit.cost: chain.range() for limit, chain in zip(self._limits, chains, strict=True)}
        """Smallest and largest value of every limited cost in the space."""
        self.ranges |= {cost: constraints.peaks[cost].range() for cost, _ in self._peak_limits()}
        for limit in constraints.limits:
            low, high = self.ranges[limit.cost]
            if limit.low > high or limit.high < low:
                raise self._infeasible(self.ranges, "in this space")
        self._put_on_grid(chains)
        self._fill_masses()
        self._list_targets()

    def draw(self, rng: random.Random) -> Arch:
        """One architecture; it keeps the limits up to a few grid cells."""
        if not self.constraints.limits:
            return uniform_arch(self.space, rng)
        cells, weights = rng.choice(self._targets)
        return self._walk(rng.choices(cells, cum_weights=weights)[0], rng)

    def nothing_found(self) -> UserError:
        """The error for limits inside the reachable range that no architecture happens to keep."""
        return self._infeasible(self.ranges, "in this space, with gaps between")

    def _infeasible(self, reachable: Mapping[str, tuple[float, float]], where: str) -> UserError:
        limited = {limit.cost for limit in self.constraints.limits}
        return infeasible(self.constraints.limits, {c: r for c, r in reachable.items() if c in limited}, where)

    def _peak_limits(self) -> list[tuple[str, float]]:
        """The limited peaks and their upper limits."""
        return [(limit.cost, limit.high) for limit in self.constraints.limits if limit.cost in self.constraints.peaks]

    def _allowed(self, block: int, link: Link, op: BlockOp) -> bool:
        """Whether an operation of a block, with what follows the last one, keeps every limit on a peak."""
        for cost, high in self._peak_limits():
            peak = self.constraints.peaks[cost]
            if peak.block(block, *link, op) > high or (
                block == self.space.num_blocks - 1 and peak.tail(link[1]) > high
            ):
                return False
        return True

    def _put_on_grid(self, chains: list[ChainCost]) -> None:
        """Every term in whole cells, counted from the smallest term of its block."""
        lows = [[min(min(t.values()) for t in terms.values()) for terms in chain.terms] for chain in chains]
        self._origin = [chain.constant + sum(low) for chain, low in zip(chains, lows, strict=True)]
        axis_cells = min(_MAX_AXIS_CELLS, int(_GRID_CELLS ** (1 / len(chains))))
        self._cell_sizes = [
            max((high - origin) / axis_cells, 1e-9)
            for (_, high), origin in zip((self.ranges[limit.cost] for limit in self._limits), self._origin, strict=True)
        ]
        self._slack = self.space.num_blocks // 2 + 1
        """Cells by which a sum can be off: every block rounds by at most half a cell."""
        self._shape = (axis_cells + 1 + self._slack,) * len(chains)
        self._steps: list[dict[Link, dict[BlockOp, Cell]]] = [
            {
                link: {
                    op: tuple(
                        round((chain.terms[i][link][op] - low[i]) / size)
                        for chain, low, size in zip(chains, lows, self._cell_sizes, strict=True)
                    )
                    for op in ops
                    if self._allowed(i, link, op)
                }
                for link, ops in chains[0].terms[i].items()
            }
            for i in range(self.space.num_blocks)
        ]

    def _fill_masses(self) -> None:
        """Backwards over the blocks: per channels before the block, how likely the rest adds so many cells."""
        end = np.zeros(self._shape)
        end[(0,) * end.ndim] = 1
        last = self.space.live_channels(len(self.space.clusters) - 1)
        self._masses: list[dict[int | None, Mass]] = [dict.fromkeys(last, end)]
        for steps in reversed(self._steps):
            after = self._masses[0]
            masses: dict[int | None, Mass] = {}
            links_from: dict[int | None, int] = {}
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
        if None not in self._masses[0]:
            raise self._infeasible(self.ranges, "in this space, each alone")
        mass = self._masses[0][None]
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
        limit, values = self._limits[axis], self._axis_values(axis)
        slack = self._slack * self._cell_sizes[axis]
        return (values >= limit.low - slack) & (values <= limit.high + slack)

    def _none_inside(self, kept: list[NDArray[np.bool_]]) -> UserError:
        """The error for limits that can each be kept but not together, with what the other limits leave of each."""
        mass = self._masses[0][None]
        reachable = {}
        for axis, limit in enumerate(self._limits):
            others = [np.ones_like(k) if a == axis else k for a, k in enumerate(kept)]
            there = np.where(reduce(np.multiply.outer, others), mass, 0)
            cells = np.flatnonzero(np.moveaxis(there, axis, 0).reshape(len(kept[axis]), -1).any(axis=1))
            if len(cells):
                low, high = self.ranges[limit.cost]
                values = np.clip(self._axis_values(axis)[cells], low, high)
                reachable[limit.cost] = (float(values[0]), float(values[-1]))
        if not reachable:
            return self._infeasible(self.ranges, "in this space, each alone")
        peaks = {cost: self.ranges[cost] for cost, _ in self._peak_limits()}
        return self._infeasible({**reachable, **peaks}, "while the other limits are kept")

    def _walk(self, target: Cell, rng: random.Random) -> Arch:
        """An architecture whose steps add up to the target cell, each choice drawn by the mass behind it."""
        before: int | None = None
        rest = target
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
            if self.space.is_first(i):
                channels.append(before)
                ops.append([])
            ops[-1].append(op)
        return Arch(tuple(channels), tuple(map(tuple, ops)))


def _add_shifted(total: Mass, mass: Mass, step: Cell, factor: float) -> None:
    """Add to `total` the mass moved up by `step` cells; what leaves the grid is dropped."""
    if all(s < size for s, size in zip(step, mass.shape, strict=True)):
        target = tuple(slice(s, None) for s in step)
        source = tuple(slice(None, size - s) for s, size in zip(step, mass.shape, strict=True))
        total[target] += factor * mass[source]
