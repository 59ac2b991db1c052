"""The prefix tree of a set of architectures: what thousands of subnets compute, each distinct part once.

Two architectures that agree on their first blocks compute the same there. A *node* of level i is a distinct choice of
operations for the blocks 0..i; its parent is the node without the last of them. Nodes of a level that take the same
operation on the same input width have the same *step* and can run as one batch. Nodes are numbered in lexicographic
order on every level, so the children of consecutive nodes are consecutive: a subtree is a range on each level.

This module needs no torch.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.plan import Plan
from bsnas.engine.space.space import Space


class Step(NamedTuple):
    """What a node computes from its parent's output: one operation on one input width."""

    operation: Operation
    inputs: int
    outputs: int
    plan: Plan


@dataclass(frozen=True)
class Level:
    """The nodes of one block."""

    steps: tuple[Step, ...]
    """Per node, what it computes."""
    parents: tuple[int, ...]
    """Per node, the number of its parent on the level above; ascending."""
    first_child: tuple[int, ...]
    """Children of the nodes a..b-1 are the nodes first_child[a]..first_child[b]-1 of the level below."""
    positions: tuple[int, ...]
    """Per node, how many nodes of the same step come before it on the level."""
    in_size: int
    """Height and width of the inputs."""
    out_size: int
    """Height and width of the outputs."""

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def widest(self) -> int:
        """The most channels that a node puts out."""
        return max(step.outputs for step in set(self.steps))

    def step_counts(self) -> Counter[Step]:
        """How many nodes take each step."""
        return Counter(self.steps)

    def groups(self, start: int, stop: int) -> dict[Step, list[int]]:
        """The nodes start..stop-1 by step, in order of first appearance."""
        groups: dict[Step, list[int]] = {}
        for node in range(start, stop):
            groups.setdefault(self.steps[node], []).append(node)
        return groups


class PrefixTree:
    """The tree of different architectures of one space.

    `levels[i]` are the nodes of block i; leaf n of the last level is the architecture `leaves[n]`, a position in the
    sequence that was given. `tail_positions[n]` leaves of the same width come before leaf n.
    """

    def __init__(self, space: Space, archs: Sequence[Arch], resolution: int) -> None:
        assert len(set(archs)) == len(archs) > 0, "different architectures, at least one"
        self.space = space
        self.resolution = resolution
        self.leaves = tuple(sorted(range(len(archs)), key=lambda a: archs[a].operations))
        ordered = [archs[a] for a in self.leaves]
        # node_of[i][a]: the node of level i through which the a-th architecture in lexicographic order passes
        node_of: list[list[int]] = []
        for i in range(space.num_blocks):
            above = node_of[-1] if node_of else [0] * len(ordered)
            nodes = [0]
            for a in range(1, len(ordered)):
                same = above[a] == above[a - 1] and ordered[a].operations[i] == ordered[a - 1].operations[i]
                nodes.append(nodes[-1] + (not same))
            node_of.append(nodes)
        self._sizes = replace(space, resolution=resolution).input_sizes()
        self.levels = tuple(self._level(i, node_of, ordered) for i in range(space.num_blocks))
        self.tail_positions = _earlier_equals(self._leaf_widths())

    def _level(self, i: int, node_of: list[list[int]], ordered: list[Arch]) -> Level:
        firsts = _first_positions(node_of[i])
        steps = tuple(self._step(i, ordered[a]) for a in firsts)
        below = node_of[i + 1] if i + 1 < len(node_of) else list(range(len(ordered)))
        return Level(
            steps=steps,
            parents=tuple(node_of[i - 1][a] if i else 0 for a in firsts),
            first_child=(*(below[a] for a in firsts), below[-1] + 1),
            positions=_earlier_equals(steps),
            in_size=self._sizes[i],
            out_size=self._sizes[i + 1],
        )

    def _step(self, i: int, arch: Arch) -> Step:
        space, operations = self.space, arch.operations
        inputs = space.supernet_width(i - 1, operations[i - 1]) if i else space.entry_channels
        plan = space.supernet_plan(i, inputs, operations[i])
        return Step(operations[i], inputs, space.supernet_width(i, operations[i]), plan)

    def final_widths(self) -> Counter[int]:
        """The channel numbers that reach the tail, each from how many leaves."""
        return Counter(self._leaf_widths())

    def _leaf_widths(self) -> list[int]:
        return [step.outputs for step in self.levels[-1].steps]


def _first_positions(nodes: list[int]) -> list[int]:
    """For ascending node numbers, the first position of each."""
    return [a for a in range(len(nodes)) if a == 0 or nodes[a] != nodes[a - 1]]


def _earlier_equals(values: Sequence[Hashable]) -> tuple[int, ...]:
    """For each value, how many equal ones stand before it."""
    seen: Counter[Hashable] = Counter()
    positions = []
    for value in values:
        positions.append(seen[value])
        seen[value] += 1
    return tuple(positions)
