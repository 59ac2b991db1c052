"""What released networks cost, block by block: MACs, parameters and peak activation memory. No torch.

A cost is what the stem, each searched block and the tail contribute, added up or the largest of them. So its extremes
come from dynamic programming over the blocks, and random architectures of a wanted cost can be drawn without rejection.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.plan import Plan, layer_sizes, size_after
from bsnas.engine.space.space import Space

Place = tuple[int, int, int, BlockOp]
"""A searched block of a released network: its index, the channels before and after it, and its choice."""
Pick = Callable[..., Any]
"""`min` or `max`."""

BYTES = 4
"""Of an activation in fp32."""


@dataclass(frozen=True)
class Cost:
    """One cost of the released networks of a space: called with an architecture, it tells its cost."""

    space: Space
    combine: Callable[[float, float], float]
    """`operator.add`, or `max` for a cost that is that of the costliest part."""
    stem: float
    block: Callable[[int, int, int, BlockOp], float]
    """Of a `Place`."""
    tail: Callable[[int], float]
    """Behind a last searched block of so many channels, the classifier included."""
    constant: float = 0
    """What every network costs beside its parts, as a call to a backend; added last."""

    def __call__(self, arch: Arch) -> float:
        total = self.stem
        for place in places_of(self.space, arch):
            total = self.combine(total, self.block(*place))
        return self.constant + self.combine(total, self.tail(arch.channels[-1]))

    @property
    def adds(self) -> bool:
        """Whether it is a sum over the parts, and not the largest of them."""
        return self.combine is operator.add

    def best(self, pick: Pick) -> tuple[float, Arch]:
        """The smallest (`pick` is `min`) or largest (`max`) cost of a live architecture, and the first that has it."""
        best: dict[int, tuple[float, tuple[Place, ...]]] = {self.space.entry_channels: (self.stem, ())}
        for i in range(self.space.num_blocks):
            found: dict[int, list[tuple[float, tuple[Place, ...]]]] = {}
            for before, channels in links(self.space, i):
                cost, places = best[before]
                for op in self.space.live_block_ops(i, channels):
                    place = i, before, channels, op
                    found.setdefault(channels, []).append((self.combine(cost, self.block(*place)), (*places, place)))
            best = {channels: pick(ways, key=itemgetter(0)) for channels, ways in found.items()}
        ends = [(self.combine(cost, self.tail(c)), places) for c, (cost, places) in best.items()]
        cost, places = pick(ends, key=itemgetter(0))
        clusters = [[places[i] for i in blocks] for blocks in self.space.cluster_blocks]
        widths, ops = [blocks[0][2] for blocks in clusters], [tuple(op for *_, op in blocks) for blocks in clusters]
        return self.constant + cost, Arch(tuple(widths), tuple(ops))

    def range(self) -> tuple[float, float]:
        """The smallest and largest cost of a live architecture."""
        return self.best(min)[0], self.best(max)[0]


def places_of(space: Space, arch: Arch) -> Iterator[Place]:
    """The searched blocks of an architecture's released network in order."""
    before, index = space.entry_channels, 0
    for channels, ops in zip(arch.channels, arch.blocks, strict=True):
        for op in ops:
            yield index, before, channels, op
            before = channels
            index += 1


def links(space: Space, block: int) -> list[tuple[int, int]]:
    """The channels before and after a block that live networks have: any pair at the first block of a cluster, the
    same number twice inside."""
    cluster = space.block_cluster[block]
    own = space.live_channels(cluster)
    if not space.is_first(block):
        return [(channels, channels) for channels in own]
    before: Iterable[int] = space.live_channels(cluster - 1) if cluster else (space.entry_channels,)
    return [(b, channels) for b in before for channels in own]


def plan_macs(plan: Plan, size: int) -> int:
    """Multiply-adds of a block that reads `size` x `size` pixels."""
    return sum(written**2 * layer.outputs * layer.taps for layer, _, written in layer_sizes(plan, size))


def plan_params(plan: Plan) -> int:
    """Weights of a block's convolutions, and scale and shift of their norms."""
    return sum(layer.outputs * layer.taps + 2 * layer.outputs for layer in plan.convs)


def plan_bytes(plan: Plan, size: int) -> int:
    """Most bytes of activations at once while a block runs, in fp32.

    While a layer runs, its input and its output are there, and behind the first one what a shortcut will add; a
    shortcut's own convolution runs first.
    """
    if not plan.layers:
        return 0
    sizes = layer_sizes(plan, size)
    largest = beside = 0
    for layer, read, written in sizes[len(plan.layers) :]:  # a shortcut's own
        beside = written**2 * layer.outputs
        largest = read**2 * layer.inputs + beside
    for layer, read, written in sizes[: len(plan.layers)]:
        largest = max(largest, beside + read**2 * layer.inputs + written**2 * layer.outputs)
        if plan.shortcut and not beside:
            beside = read**2 * layer.inputs
    if plan.pool:
        largest = max(largest, (written**2 + size_after(written, 2) ** 2) * layer.outputs)
    return BYTES * largest


class CostModel:
    """The costs of a space that are counted. Blocks are counted once and remembered."""

    macs: Cost
    """Multiply-adds for one image.

    Of convolutions and linear layers, without bias additions and batch normalisation, as the field counts ("FLOPs" in
    NAS papers means this number)."""
    params: Cost
    """Trained parameters, batch normalisation's scale and shift and the classifier's bias among them."""
    activation_bytes: Cost
    """Most bytes of activations held at once for one image, in fp32 (`plan_bytes`)."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._sizes = space.input_sizes()

        def cost(combine: Callable[[float, float], float], of: Callable[[Plan, int], int], classifier: Any) -> Cost:
            def block(index: int, before: int, channels: int, op: BlockOp) -> float:
                return of(space.released_plan(index, before, Operation(op, channels)), self._sizes[index])

            def chain(plans: Iterable[Plan], size: int, total: float) -> float:
                for plan in plans:
                    total = combine(total, of(plan, size))
                    size = size_after(size, plan.stride)
                return total

            def tail(channels: int) -> float:
                features = space.classifier_inputs(channels)
                return chain(space.tail_plans(channels), self._sizes[-1], classifier(features))

            return Cost(space, combine, chain(space.stem_plans, space.resolution, 0), cache(block), cache(tail))

        classes = space.classes
        self.macs = cost(operator.add, plan_macs, lambda features: features * classes)
        self.params = cost(operator.add, lambda plan, _: plan_params(plan), lambda features: (features + 1) * classes)
        self.activation_bytes = cost(max, plan_bytes, lambda _: 0)

    def macs_and_params(self, arch: Arch) -> tuple[int, int]:
        """(multiply-adds for one image, parameters) of the released network."""
        return int(self.macs(arch)), int(self.params(arch))


@cache
def size_scale(space: Space) -> Callable[[Arch], float]:
    """Tells where the parameters of an architecture lie between the fewest of the space, 0, and the most, 1, by their
    logarithm."""
    params = CostModel(space).params
    low, high = map(math.log, params.range())
    return lambda arch: (math.log(params(arch)) - low) / (high - low) if high > low else 0.5
