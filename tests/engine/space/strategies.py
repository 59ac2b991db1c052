"""Random search spaces for property tests: any families, axes, rows, clusters and springs, full or shrunk."""

import random

from hypothesis import strategies as st

from bsnas.engine.space.arch import Operation
from bsnas.engine.space.families import FAMILIES
from bsnas.engine.space.space import Space
from bsnas.engine.space.table import Cluster, Row


def options(draw: st.DrawFn, values: tuple, most: int) -> tuple:  # type: ignore[type-arg]
    return tuple(draw(st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)))


@st.composite
def rows(draw: st.DrawFn, families: tuple[str, ...] = tuple(FAMILIES)) -> Row:
    name = draw(st.sampled_from(families))
    family = FAMILIES[name]
    pool = "pool" in family.settings and draw(st.integers(0, 5)) == 0
    expand = "expand" not in family.settings or draw(st.integers(0, 4)) > 0
    hidden = {}
    if family.hidden and expand:
        hidden = draw(
            st.sampled_from(
                (
                    {"expansions": options(draw, (1, 2, 3), 2)},
                    {"widths": options(draw, (3, 5, 8), 2)},
                )
            )
        )
    return Row(
        family=name,
        blocks=draw(st.integers(1, 3)),
        stride=draw(st.sampled_from((1, 1, 2))),
        kernels=options(draw, (1, 3, 5), 2),
        activations=options(draw, ("relu", "relu6"), 2),
        identity=not pool and draw(st.integers(0, 2)) == 0,
        expand=expand,
        shortcut="none" if "shortcut" in family.settings and draw(st.booleans()) else "projection",
        pool=pool,
        **hidden,
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    return Cluster(channels=options(draw, (3, 4, 6, 8), 3), rows=tuple(draw(st.lists(rows(), min_size=1, max_size=2))))


@st.composite
def single(draw: st.DrawFn) -> Cluster:
    """A cluster without a choice, as stems and tails are."""
    row = Row(
        family=draw(st.sampled_from(("conv", "separable"))),
        stride=draw(st.sampled_from((1, 2))),
        kernels=(draw(st.sampled_from((1, 3))),),
        activations=(draw(st.sampled_from(("relu", "relu6"))),),
    )
    return Cluster(channels=(draw(st.integers(2, 9)),), rows=(row,))


@st.composite
def full_spaces(draw: st.DrawFn) -> Space:
    """Spaces with every operation alive."""
    return Space(
        table=(
            *draw(st.lists(single(), max_size=2)),
            *draw(st.lists(clusters(), min_size=1, max_size=3)),
            *draw(st.lists(single(), max_size=2)),
        ),
        springs=draw(st.sampled_from(("fixed", "sliced"))),
        resolution=draw(st.integers(5, 20)),
        input_channels=draw(st.sampled_from((1, 3))),
        classes=draw(st.integers(2, 5)),
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
