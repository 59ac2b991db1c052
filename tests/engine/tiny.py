"""A small space with every kind of cluster, and images and architectures for it."""

import random
from typing import Any

import torch
from torch import Tensor

from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space

SHARINGS = ("nested", "channels", "independent")


def tiny_space(**changes: Any) -> Space:
    table: dict[str, Any] = {
        "clusters": (
            mobile_cluster(blocks=2, kernels=(3, 5), expansions=(2, 3), channels=(8, 12), stride=2),
            mobile_cluster(blocks=1, kernels=(3,), expansions=(2,), channels=(16, 24), stride=1),
            mobile_cluster(blocks=2, kernels=(5,), expansions=(3,), channels=(20, 32), stride=2),
        ),
        "resolution": 16,
        "classes": 4,
        "stem_channels": 6,
        "separable_channels": 4,
        "tail_channels": 40,
    }
    return mobile_space(**{**table, **changes})


TINY = tiny_space()
ARCH = Arch((8, 16, 20), ((BlockOp(3, 2), BlockOp(5, 3)), (BlockOp(3, 2),), (BlockOp(5, 3), BlockOp(5, 3))))


def images(space: Space, count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, space.input_channels, space.resolution, space.resolution, generator=generator)


def random_archs(space: Space, count: int, seed: int = 0) -> list[Arch]:
    rng = random.Random(seed)
    return [uniform_arch(space, rng) for _ in range(count)]
