"""`basic`: ResNet's basic block (arXiv 1512.03385): two convolutions, activation after the sum."""

from bsnas.engine.space.families.family import Block, Family, residual
from bsnas.engine.space.plan import Conv, Plan


def plan(block: Block) -> Plan:
    hidden = block.width or block.expansion * block.channels
    return Plan(
        (
            Conv("first", block.inputs, hidden, block.kernel, block.stride, activation=block.activation),
            Conv("second", hidden, block.outputs, block.kernel, activation=block.activation),
        ),
        residual(block),
    )


FAMILY = Family("basic", "ResNet's block of two convolutions", plan, True, frozenset({"shortcut"}))
