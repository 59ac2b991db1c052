"""An architecture drawn as in the paper's Figure 4, beside MobileNetV2."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Space
from bsnas.search.reporting.picture import MUTED, Picture, drawing, kernel_color

MOBILENET_V2 = (
    (1, 16, 1, 1),
    (2, 24, 2, 6),
    (3, 32, 2, 6),
    (4, 64, 2, 6),
    (3, 96, 1, 6),
    (3, 160, 2, 6),
    (1, 320, 1, 6),
)
"""Blocks, channels, stride of the first, expansion: Table 2 of the MobileNetV2 paper; every kernel is 3."""


class Bar(NamedTuple):
    """One block as it is drawn."""

    channels: int
    kernel: int
    """0 where nothing is convolved."""
    ratio: float
    """Hidden width over input width."""
    stride: int
    choice: str
    text: str


def architecture_picture(space: Space, arch: Arch, what: str) -> Picture:
    """The architecture (`what` names it) and MobileNetV2 1.0, blocks from top to bottom."""
    macs, params = CostModel(space).macs_and_params(arch)
    caption = (
        f"Length: channels. Colour: kernel. Thickness: expansion. Dashed: downsampling. Stem and tail are left out. "
        f"{what}: {macs / 1e6:,.2f} M MACs, {params / 1e6:,.2f} M parameters."
    )
    mine, theirs = bars_of(space, arch), mobilenet_bars()
    rows = max(len(mine), len(theirs))
    title = "Architecture beside MobileNetV2 (Figure 4)"
    with drawing("architecture", title, caption, height=90 + 21 * rows, panels=2) as (picture, (left, right)):
        _draw(picture, left, "block", mine, rows)
        _draw(picture, right, "peer", theirs, rows)
        left.set_title(f"{what}, {space.resolution}²")
        right.set_title("MobileNetV2, 224²")
        widest = max(bar.channels for bar in (*mine, *theirs))
        own = max(bar.channels for bar in mine)
        # Small spaces keep a scale of their own, or their bars would be slivers beside 320 channels.
        left.set_xlim(0, 1.02 * (own if widest > 2 * own else widest))
        right.set_xlim(0, 1.02 * widest)
        kernels = sorted({bar.kernel for bar in (*mine, *theirs)} - {0})
        handles: list[Patch | Line2D] = [Patch(color=kernel_color(k), label=f"{k}×{k}") for k in kernels]
        handles.append(Line2D([], [], color=MUTED, ls="--", lw=1, label="stride 2"))
        picture.figure.legend(handles=handles, loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1.3)
    return picture


def bars_of(space: Space, arch: Arch) -> list[Bar]:
    bars = []
    for block, (plan, op) in enumerate(zip(space.released_plans(arch), arch.operations, strict=True)):
        ratio = plan.hidden / plan.layers[0].inputs if plan.layers else 0
        text = f"block {block + 1}: {op.block_op} c{op.channels}"
        bars.append(Bar(op.channels, plan.kernel, ratio, plan.stride, str(op.block_op), text))
    return bars


def mobilenet_bars() -> list[Bar]:
    bars: list[Bar] = []
    for blocks, channels, stride, ratio in MOBILENET_V2:
        for index in range(blocks):
            text = f"MobileNetV2 block {len(bars) + 1}: k3t{ratio} c{channels}"
            bars.append(Bar(channels, 3, ratio, stride if index == 0 else 1, f"k3t{ratio}", text))
    return bars


def _draw(picture: Picture, axes: Axes, gid: str, bars: Sequence[Bar], rows: int) -> None:
    thickest = max(6, *(bar.ratio for bar in bars))
    for row, bar in enumerate(bars):
        height = 0.28 + 0.55 * bar.ratio / thickest
        mark = picture.mark(f"{gid}-{row}", [bar.text + (", stride 2" if bar.stride == 2 else "")])
        axes.add_patch(
            Rectangle((0, row - height / 2), bar.channels, height, color=kernel_color(bar.kernel), lw=0, gid=mark)
        )
        if bar.stride == 2:
            axes.axhline(row - 0.5, color=MUTED, ls="--", lw=1)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), [f"{bar.choice}  {bar.channels:>3}" for bar in bars], fontsize=9.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.set_xlabel("channels")
    axes.spines["left"].set_visible(False)
