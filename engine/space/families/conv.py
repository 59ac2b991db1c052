"""`conv`: one convolution with norm and activation, and a max pool behind it where asked for: stems and tails."""

from bsnas.engine.space.families.family import Block, Family
from bsnas.engine.space.plan import Conv, Plan


def plan(block: Block) -> Plan:
    layer = Conv("conv", block.inputs, block.outputs, block.kernel, block.stride, activation=block.activation)
    return Plan((layer,), pool=block.pool)


FAMILY = Family(
    "conv", "convolution, norm, activation, and a 3x3 max pool with `pool = true`", plan, False, frozenset({"pool"}),
    fixed_text=True,
)  # fmt: skip
