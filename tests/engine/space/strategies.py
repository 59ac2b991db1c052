"""Random search spaces for property tests: any number of clusters, blocks and options, full or shrunk."""

import random

from hypothesis import strategies as st

from bsnas.engine.space.space import Cluster, Operation, Space


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    def options(values: tuple[int, ...], most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)))

    return Cluster(
        blocks=draw(st.integers(1, 4)),
        kernels=options((1, 3, 5, 7), 3),
        expansions=options((1, 2, 3, 6), 3),
        channels=options((3, 4, 6, 8, 11), 4),
        stride=draw(st.sampled_from((1, 2))),
    )


@st.composite
def full_spaces(draw: st.DrawFn) -> Space:
    """Spaces with every operation alive."""
    return Space(
        clusters=tuple(draw(st.lists(clusters(), min_size=1, max_size=4))),
        resolution=draw(st.integers(5, 20)),
        input_channels=draw(st.sampled_from((1, 3))),
        classes=draw(st.integers(2, 5)),
        stem_channels=draw(st.integers(2, 6)),
        stem_stride=draw(st.sampled_from((1, 2))),
        separable_channels=draw(st.integers(2, 6)),
        tail_channels=draw(st.integers(4, 9)),
    )


@st.composite
def shrunk_spaces(draw: st.DrawFn) -> Space:
    """Spaces that lost operations, more under some channel numbers and blocks than under others."""
    space = draw(full_spaces())
    rng = random.Random(draw(st.integers(0, 2**32)))
    return shrunk_at_random(space, rng)


def shrunk_at_random(space: Space, rng: random.Random) -> Space:
    live: list[list[Operation]] = []
    for j, blocks in enumerate(space.cluster_blocks):
        kept = rng.sample(space.live_channels(j), rng.randint(1, len(space.live_channels(j))))
        for i in blocks:
            ops = [op for op in space.live[i] if op.channels in kept]
            needed = {rng.choice([op for op in ops if op.channels == channels]) for channels in kept}
            live.append([op for op in ops if op in needed or rng.random() < 0.4])
    return space.with_live(live)


def any_spaces() -> st.SearchStrategy[Space]:
    return full_spaces() | shrunk_spaces()
