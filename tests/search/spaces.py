"""Random small spaces, shrunk ones included, for property tests of the search."""

import itertools
import random

from bsnas.engine.space.arch import Arch
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.space import Space


def random_space(rng: random.Random, *, max_architectures: int = 4000) -> Space:
    """A space of up to three clusters whose blocks keep random live operations; small enough to enumerate."""
    for clusters in (3, 2, 1):
        space = _random_space(rng, clusters)
        if space.num_architectures <= max_architectures:
            return space
    return _random_space(rng, 1)


def _random_space(rng: random.Random, num_clusters: int) -> Space:
    clusters = tuple(
        mobile_cluster(
            blocks=rng.randint(1, 2),
            kernels=tuple(rng.sample((3, 5, 7), rng.randint(1, 2))),
            expansions=tuple(rng.sample((2, 3, 6), rng.randint(1, 2))),
            channels=tuple(rng.sample((4, 6, 8, 12), rng.randint(1, 3))),
            stride=rng.choice((1, 2)),
        )
        for _ in range(num_clusters)
    )
    space = mobile_space(
        clusters=clusters, resolution=16, classes=4, stem_channels=4, separable_channels=4, tail_channels=16
    )
    live = []
    for j, blocks in enumerate(space.cluster_blocks):
        kept = rng.sample(space.live_channels(j), rng.randint(1, len(space.live_channels(j))))
        for i in blocks:
            ops = [op for op in space.live[i] if op.channels in kept]
            must = [rng.choice([op for op in ops if op.channels == c]) for c in kept]
            live.append([op for op in ops if op in must or rng.random() < 0.5])
    return space.with_live(live)


def all_archs(space: Space) -> list[Arch]:
    """Every live architecture of a small space."""
    per_cluster = [
        [
            (channels, ops)
            for channels in space.live_channels(j)
            for ops in itertools.product(*(space.live_block_ops(i, channels) for i in blocks))
        ]
        for j, blocks in enumerate(space.cluster_blocks)
    ]
    return [
        Arch(tuple(channels for channels, _ in choice), tuple(ops for _, ops in choice))
        for choice in itertools.product(*per_cluster)
    ]
