"""`separable`: depthwise convolution and linear projection, as MobileNetV2's first block."""

from bsnas.engine.space.families.family import Block, Family
from bsnas.engine.space.plan import Conv, Plan


def plan(block: Block) -> Plan:
    return Plan(
        (
            Conv(
                "depthwise", block.inputs, block.inputs, block.kernel, block.stride, depthwise=True,
                activation=block.activation,
            ),
            Conv("project", block.inputs, block.outputs),
        ),
        "identity" if block.keeps_size else None,
    )  # fmt: skip


FAMILY = Family("separable", "depthwise convolution, 1x1 projection", plan, False, fixed_text=True)
