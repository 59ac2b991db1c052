"""A search space drawn: where its networks lie in multiply-adds and parameters, and its largest network."""

from collections.abc import Sequence

from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import format_count
from bsnas.engine.space.space import Space
from bsnas.search.reporting.architecture import bars_of
from bsnas.search.reporting.picture import BLUE, FAINT, GREEN, MUTED, Picture, drawing, kernel_color


def space_picture(space: Space, name: str, macs: Sequence[float], params: Sequence[float]) -> Picture:
    """Histograms of random networks, and of every block its options of channels over the largest network's bars."""
    most, largest = CostModel(space).macs.best(max)
    bars = bars_of(space, largest)
    caption = (
        f"{len(macs):,} random networks by multiply-adds and parameters. Right: every block's channels in the largest "
        "network; ticks are its cluster's other options. Colour: kernel."
    )
    height = max(260, 90 + 21 * len(bars))
    with drawing("space", name, caption, height=height, width=760, panels=3) as (picture, (left, middle, right)):
        for axes, values, label, color in (
            (left, macs, "multiply-adds, M", BLUE), (middle, params, "parameters, M", GREEN)
        ):  # fmt: skip
            axes.hist([value / 1e6 for value in values], bins=30, color=color)
            axes.set_xlabel(label)
            axes.set_yticks([])
        for row, bar in enumerate(bars):
            color = kernel_color(bar.kernel) if bar.kernel else FAINT
            right.barh(row, bar.channels, 0.7, color=color)
            options = space.live_channels(space.block_cluster[row])
            right.plot(options, [row] * len(options), ls="", marker="|", color=MUTED, ms=7)
        right.set_yticks(range(len(bars)), [bar.choice for bar in bars], fontsize=9)
        right.set_ylim(len(bars) - 0.4, -0.6)
        right.grid(False, axis="y")
        right.set_xlabel("channels")
        right.set_title(f"largest: {format_count(most)}")
    return picture


def text_histogram(values: Sequence[float], lines: int = 10, width: int = 40) -> list[str]:
    """Lines of `VALUE  bar`, from the smallest values to the largest."""
    low, high = min(values), max(values)
    step = (high - low) / lines or 1
    counts = [0] * lines
    for value in values:
        counts[min(lines - 1, int((value - low) / step))] += 1
    tallest = max(counts)
    return [
        f"{format_count(low + row * step):>9}  {'█' * round(width * count / tallest)}"
        for row, count in enumerate(counts)
    ]
