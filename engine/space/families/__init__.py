"""The families of blocks that a space can be made of: one file each, listed here (docs/extending.md)."""

from bsnas.engine.space.families import basic, bottleneck, conv, inverted_residual, separable
from bsnas.engine.space.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (inverted_residual.FAMILY, conv.FAMILY, separable.FAMILY, basic.FAMILY, bottleneck.FAMILY)
}
