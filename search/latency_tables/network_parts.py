"""Released networks cut into parts: the stem, the blocks, and the tail with the classifier.

A part's latency depends on its form alone: its plans and its input size. Blocks inside a cluster share forms, so
Table 1 has about 400 of them. No torch.
"""

from dataclasses import dataclass

from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.cost import links, places_of
from bsnas.engine.space.plan import Plan
from bsnas.engine.space.space import Space


@dataclass(frozen=True)
class Part:
    """The form of a part of a released network; `block 24-144-24 k5 s1 16x16` as text."""

    kind: str
    """`stem`, `block` or `tail`."""
    plans: tuple[Plan, ...]
    """One after another."""
    inputs: int
    """Channels of the input."""
    size: int
    """Input H and W in pixels."""
    classes: int = 0
    """Of the classifier behind a tail."""

    def __str__(self) -> str:
        layers = [layer for plan in self.plans for layer in plan.layers]
        widths = [self.inputs, *(layer.outputs for layer in layers if not layer.depthwise)]
        widths += [self.classes] if self.classes else []
        kernel = max((layer.kernel for layer in layers), default=1)
        stride = max((layer.stride for layer in layers), default=1)
        text = f"{self.kind} {'-'.join(map(str, widths))} k{kernel} s{stride} {self.size}x{self.size}"
        return text if self._is_mobile else f"{text} ({' / '.join(map(str, self.plans))})"

    @property
    def _is_mobile(self) -> bool:
        """Whether its widths, kernel and stride say everything: it stands in Table 1's place of its kind."""
        layers = [[(la.depthwise, la.kernel > 1, la.activation) for la in plan.layers] for plan in self.plans]
        spread = (True, True, "relu6")
        forms = {
            "stem": [[(False, True, "relu6")], [spread, (False, False, None)]],
            "block": [[(False, False, "relu6"), spread, (False, False, None)]],
            "tail": [[(False, False, "relu6")]],
        }
        ordinary = all(plan.shortcut in (None, "identity") and not plan.pool for plan in self.plans)
        kernels = {layer.kernel for plan in self.plans for layer in plan.layers if layer.kernel > 1}
        strides = [layer.stride for plan in self.plans[1:] for layer in plan.layers]
        return ordinary and layers == forms[self.kind] and len(kernels) < 2 and set(strides) <= {1}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        return self.inputs, self.size, self.size

    @property
    def repeats(self) -> bool:
        """Whether its output can be its input."""
        if self.kind != "block":
            return False
        (plan,) = self.plans
        return plan.stride == 1 and self.inputs == plan.layers[-1].outputs


class PartTable:
    """Which parts the released networks of a space are made of."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._sizes = space.input_sizes()
        self.stem = Part("stem", space.stem_plans, space.input_channels, space.resolution) if space.stem else None

    def block(self, index: int, before: int, channels: int, op: BlockOp) -> Part | None:
        """None where the block is nothing."""
        plan = self.space.released_plan(index, before, Operation(op, channels))
        return Part("block", (plan,), before, self._sizes[index]) if plan.layers else None

    def tail(self, channels: int) -> Part:
        return Part("tail", self.space.tail_plans(channels), channels, self._sizes[-1], self.space.classes)

    def named_parts(self, arch: Arch) -> list[tuple[str, Part]]:
        """The parts of an architecture in network order, with their places; blocks that are nothing are left out."""
        blocks = [(f"block {place[0] + 1}", self.block(*place)) for place in places_of(self.space, arch)]
        named = [("stem", self.stem), *blocks, ("tail", self.tail(arch.channels[-1]))]
        return [(name, part) for name, part in named if part is not None]

    def parts(self, arch: Arch) -> tuple[Part, ...]:
        """The parts of an architecture in network order."""
        return tuple(part for _, part in self.named_parts(arch))

    def all_parts(self) -> list[Part]:
        """Every form that a live architecture can have, each once, in network order."""
        space, found = self.space, [self.stem]
        for i in range(space.num_blocks):
            for before, channels in links(space, i):
                found += [self.block(i, before, channels, op) for op in space.live_block_ops(i, channels)]
        found += map(self.tail, space.live_channels(len(space.clusters) - 1))
        return list(dict.fromkeys(part for part in found if part is not None))
