"""`ir`: MobileNetV2's inverted residual (arXiv 1801.04381): expand, depthwise, linear projection, shortcut."""

from bsnas.engine.space.families.family import Block, Family
from bsnas.engine.space.plan import Conv, Plan


def plan(block: Block) -> Plan:
    """No expand convolution with `expand = false` or an expansion of 1: hidden is the input then."""
    expands = block.expand and block.expansion != 1
    hidden = (block.width or block.expansion * block.base) if expands else block.inputs
    expand = (Conv("expand", block.inputs, hidden, activation=block.activation),) if expands else ()
    return Plan(
        (
            *expand,
            Conv("depthwise", hidden, hidden, block.kernel, block.stride, depthwise=True, activation=block.activation),
            Conv("project", hidden, block.outputs),
        ),
        "identity" if block.keeps_size else None,
    )


FAMILY = Family("ir", "inverted residual: 1x1 expansion, depthwise, 1x1 projection", plan, True, frozenset({"expand"}))
