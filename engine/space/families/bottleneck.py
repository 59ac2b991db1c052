"""`bottleneck`: ResNet's block of 1x1, kxk and 1x1 convolutions, the stride in the middle one (ResNet v1.5)."""

from bsnas.engine.space.families.family import Block, Family, residual
from bsnas.engine.space.plan import Conv, Plan


def plan(block: Block) -> Plan:
    hidden = block.width or block.expansion * block.channels
    return Plan(
        (
            Conv("first", block.inputs, hidden, activation=block.activation),
            Conv("second", hidden, hidden, block.kernel, block.stride, activation=block.activation),
            Conv("third", hidden, block.outputs, activation=block.activation),
        ),
        residual(block),
    )


FAMILY = Family("bottleneck", "ResNet's block of 1x1, kxk and 1x1", plan, True, frozenset({"shortcut"}))
