"""Draw the pictures of docs/how-it-works.md into docs/img/, from the code that they explain.

python docs/draw.py
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from bsnas.engine.evaluation.tree import PrefixTree
from bsnas.engine.space.arch import Arch, BlockOp
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.space.shrink import importance, shrink

OUT = ROOT / "docs/img"
INK, MUTED, LINE, PAPER = "#1b1f24", "#59636e", "#b6bec7", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE = "#9fc5e8", "#f5c9a3", "#a9d8b8", "#e9b3b0", "#d8bfe8"


@contextmanager
def sheet(name: str, width: float, height: float) -> Iterator[Axes]:
    """An empty sheet of `width` by `height` units, (0, 0) at the top left; it becomes docs/img/NAME.svg."""
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 11, "text.color": INK}):
        figure = Figure(figsize=(width * 0.6, height * 0.6), facecolor=PAPER)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(height, 0)
        yield axes
        OUT.mkdir(exist_ok=True)
        metadata: Any = {"Date": None, "Creator": None}
        FigureCanvasSVG(figure).print_svg(OUT / f"{name}.svg", metadata=metadata)


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str = PAPER, **style: Any) -> None:
    patch = FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec=MUTED, lw=1)
    axes.add_patch(patch)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", **{"fontsize": 10, **style})


def arrow(axes: Axes, x0: float, y0: float, x1: float, y1: float, **style: Any) -> None:
    axes.annotate(
        "", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "-|>", "color": MUTED, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    )


def note(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    axes.text(x, y, text, va="center", **{"fontsize": 10, "color": MUTED, **style})


def spring_blocks() -> None:
    """Widths of two clusters inside the supernet, and released."""
    options, chosen = ((24, 32, 40), (40, 48, 56)), (24, 48)
    with sheet("spring-blocks", 17, 7.6) as axes:
        for row, (title, released) in enumerate((("in the supernet", False), ("released", True))):
            y = 1.0 + 3.7 * row
            note(axes, 0.2, y - 0.5, title, color=INK, fontweight="bold", fontsize=11)
            x, width = 2.1, 16
            box(axes, 0.2, y + 0.3, 1.1, 1.1, "16", BLUE)
            for cluster, (channels, c) in enumerate(zip(options, chosen, strict=True)):
                for block in range(2):
                    spring = block == 1
                    out = c if released or not spring else channels[-1]
                    arrow(axes, x - 0.8, y + 0.85, x, y + 0.85)
                    text = f"block {2 * cluster + block + 1}\n{width} → {6 * width} → {out}"
                    box(axes, x, y + 0.2, 2.6, 1.3, text, ORANGE if spring else PAPER)
                    width = out
                    x += 3.4
                label = f"cluster {cluster + 1}: c = {c} of {', '.join(map(str, channels))}"
                note(axes, x - 3.8, y + 1.9, label, ha="center")
            arrow(axes, x - 0.8, y + 0.85, x, y + 0.85)
            note(axes, x + 0.1, y + 0.85, "next\ncluster")
        text = "Orange: spring blocks. In the supernet they put out the largest option: the next cluster always fits."
        note(axes, 0.2, 7.3, text)


def fair_sampling() -> None:
    """One real round of a space with two clusters: every operation of every block once."""
    space = mobile_space(
        resolution=16,
        classes=10,
        clusters=(
            mobile_cluster(blocks=2, kernels=(3, 5), expansions=(3,), channels=(16, 24), stride=2),
            mobile_cluster(blocks=2, kernels=(3, 5), expansions=(6,), channels=(32, 48), stride=2),
        ),
    )
    archs = fair_round(space, 0, 0)
    colors = {(0, 16): BLUE, (0, 24): PURPLE, (1, 32): GREEN, (1, 48): ORANGE}
    with sheet("fair-sampling", 15, 1.6 + 1.05 * len(archs)) as axes:
        for column, name in enumerate(("block 1", "block 2", "block 3", "block 4")):
            note(axes, 4.1 + 2.7 * column, 0.4, name, ha="center")
        for row, arch in enumerate(archs):
            y = 0.8 + 1.05 * row
            note(axes, 0.3, y + 0.4, f"path {row + 1} of the round", color=INK)
            column = 0
            for cluster, (channels, ops) in enumerate(zip(arch.channels, arch.blocks, strict=True)):
                for op in ops:
                    text = f"{op}, c = {channels}"
                    box(axes, 3.0 + 2.7 * column, y, 2.3, 0.8, text, colors[cluster, channels])
                    column += 1
        text = "Each column holds every operation once. Colour: a cluster's channels, the same in all of its blocks."
        note(axes, 0.3, 1.2 + 1.05 * len(archs), text)


def shrinking() -> None:
    """A real step on a small space: importance of the operations of one block, and what is kept."""
    space = mobile_space(
        resolution=16,
        classes=10,
        clusters=(mobile_cluster(blocks=2, kernels=(3, 5, 7), expansions=(3, 6), channels=(16, 24), stride=2),),
    )
    archs = [arch for number in range(20) for arch in fair_round(space, 0, number)]
    top1 = [sum(op.kernel + 2 * op.expansion for op in arch.flat_blocks) + arch.channels[0] / 8 for arch in archs]
    ratios = importance(space, archs, top1)
    after = shrink(space, ratios, 4)
    with sheet("shrinking", 16, 7.3) as axes:
        thirds = (("best third", GREEN), ("middle", PAPER), ("worst third", RED))
        for row, (text, color) in enumerate(thirds):
            box(axes, 0.3, 0.9 + 1.5 * row, 3.4, 1.3, f"{text}\n{len(archs) // 3} subnets", color)
        note(axes, 0.3, 0.4, f"{len(archs)} fair-sampled subnets by top-1", color=INK)
        arrow(axes, 3.9, 3.1, 5.0, 3.1)
        note(axes, 5.2, 0.4, "R of every operation of a block: (best third − worst third) / all", color=INK)
        ordered = sorted(ratios[1].items(), key=lambda item: -item[1])
        for column, (op, ratio) in enumerate(ordered):
            x = 5.4 + 0.86 * column
            kept = op in after.live[1]
            axes.add_patch(Rectangle((x, 3.1), 0.6, -1.9 * ratio, fc=GREEN if kept else RED, ec=MUTED, lw=0.8))
            axes.text(x + 0.3, 5.25, str(op), rotation=90, ha="center", va="top", fontsize=9)
        axes.plot([5.2, 15.8], [3.1, 3.1], color=MUTED, lw=1)
        text = "Green: kept, at most 4 here and only where R > 0. The others leave the supernet with their weights."
        note(axes, 0.3, 7.0, text)


def evaluator() -> None:
    """The prefix tree of a few subnets, as the evaluator builds it."""

    def arch(*kernels: int) -> Arch:
        return Arch((16, 24), (tuple(BlockOp(k, 6) for k in kernels[:2]), tuple(BlockOp(k, 6) for k in kernels[2:])))

    space = mobile_space(
        resolution=16,
        classes=10,
        clusters=tuple(
            mobile_cluster(blocks=2, kernels=(3, 5, 7), expansions=(6,), channels=(c,), stride=2) for c in (16, 24)
        ),
    )
    archs = [arch(3, 3, 5, 3), arch(3, 3, 5, 7), arch(3, 5, 3, 3), arch(3, 5, 3, 7), arch(7, 5, 3, 3), arch(7, 5, 3, 5)]
    tree = PrefixTree(space, archs, space.resolution)
    levels = [sorted({tuple(a.flat_blocks[: depth + 1]) for a in archs}, key=str) for depth in range(4)]
    assert [len(level) for level in levels] == [len(level) for level in tree.levels]
    with sheet("evaluator", 16, 8.4) as axes:
        box(axes, 0.3, 3.2, 1.9, 1.4, "images,\nstem")
        places: dict[Any, tuple[float, float]] = {(): (2.2, 3.9)}
        palette = {3: BLUE, 5: ORANGE, 7: PURPLE}
        for depth, prefixes in enumerate(levels):
            note(axes, 3.8 + 3.0 * depth, 0.4, f"block {depth + 1}: {len(prefixes)} of {len(archs)}", ha="center")
            for row, prefix in enumerate(prefixes):
                y = 0.9 + 6.3 * (row + 0.5) / len(prefixes)
                x = 2.9 + 3.0 * depth
                x0, y0 = places[prefix[:-1]]
                arrow(axes, x0, y0, x, y)
                box(axes, x, y - 0.36, 1.8, 0.72, str(prefix[-1]), palette[prefix[-1].kernel])
                places[prefix] = (x + 1.8, y)
        for prefix in levels[-1]:
            x, y = places[prefix]
            note(axes, x + 0.15, y, "top-1", color=INK)
        computed = sum(map(len, levels))
        note(
            axes, 0.3, 7.6, f"{len(archs)} subnets of 4 blocks: {computed} blocks are computed in place of "
            f"{4 * len(archs)}. Equal colours of a level run as one batch."
        )  # fmt: skip


def kernels() -> None:
    """What is read and written by a training block: layer by layer, and fused."""
    layers = ["expand 1×1", "BN + ReLU6", "depthwise k×k", "BN + ReLU6", "project 1×1", "BN + add"]
    with sheet("kernels", 17, 8.2) as axes:
        note(axes, 0.3, 0.5, "layer by layer: every box reads and writes memory", color=INK, fontweight="bold")
        for column, layer in enumerate(layers):
            x = 0.3 + 2.75 * column
            box(axes, x, 1.1, 2.2, 1.0, layer, BLUE if "1×1" in layer or "k×k" in layer else PAPER)
            axes.plot([x + 0.4, x + 0.4], [2.1, 2.9], color=RED, lw=4)
            axes.plot([x + 1.8, x + 1.8], [2.1, 2.9], color=RED, lw=4)
        box(axes, 0.3, 2.9, 16, 0.6, "GPU memory")
        note(axes, 0.3, 4.5, "fused: BN and ReLU6 are applied as the next kernel loads", color=INK, fontweight="bold")
        on_load = "BN + ReLU6 on load,\n"
        fused = ["expand 1×1,\nsums for BN", f"{on_load}depthwise, sums", f"{on_load}project, sums"]
        for column, layer in enumerate([*fused, "BN + add"]):
            x = 0.3 + 4.1 * column
            box(axes, x, 5.1, 3.7, 1.2, layer, BLUE if column < 3 else PAPER)
            axes.plot([x + 0.6, x + 0.6], [6.3, 7.1], color=RED, lw=4)
            axes.plot([x + 3.1, x + 3.1], [6.3, 7.1], color=RED, lw=4)
        box(axes, 0.3, 7.1, 16, 0.6, "GPU memory: raw convolution outputs and the block's output")


DRAWINGS = (spring_blocks, fair_sampling, shrinking, evaluator, kernels)

if __name__ == "__main__":
    for draw in DRAWINGS:
        draw()
