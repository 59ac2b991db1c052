"""A picture: one matplotlib figure that becomes an SVG file, a PNG file, and a part of the page.

matplotlib draws all three, so they cannot differ. In the page, colours become CSS variables (light and dark), and marks
that carry a `gid` get hover texts from a few lines of script, which keeps a report far smaller than one that ships a
charting library: plotly's bundle alone is 4.5 MB, vega's 0.8 MB.

A picture is laid out for a width of about 345 CSS pixels, so that it is legible on a phone and three fit side by side
on a desktop.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, MUTED, GRID, CARD = "#1b1f24", "#59636e", "#d9dee3", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE = "#1f6fb5", "#c2571a", "#1a7f45", "#c0322b", "#7d4aa8"
SERIES = (BLUE, ORANGE, GREEN, PURPLE)
STEPS = ("#9fc5e8", "#5b9bd1", "#2a71b0", "#134a7c")
"""From early to late, light to dark."""
KERNELS = {3: "#5b9bd1", 5: "#e0973a", 7: "#b0559d"}
FAINT = "#b6bec7"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", CARD: "card", BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red",
    PURPLE: "purple", FAINT: "faint", **{color: f"step-{i}" for i, color in enumerate(STEPS) if i != 1},
    **{color: f"kernel-{kernel}" for kernel, color in KERNELS.items()},
}  # fmt: skip
"""CSS variable of each colour; a colour that is not here stays as it is."""
OTHER_KERNELS = (GREEN, RED, BLUE, ORANGE)
WIDTH = 345
PNG_DPI = 160
_STYLE: Any = {
    "font.size": 11.5, "font.family": "sans-serif", "axes.titlesize": 11, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.labelsize": 11, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5,
    "legend.fontsize": 10.5, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": FAINT, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True, "figure.facecolor": CARD,
    "axes.facecolor": "none", "text.parse_math": False, "lines.linewidth": 1.8, "legend.labelcolor": INK,
}  # fmt: skip


@dataclass
class Picture:
    """A drawn figure and what its marks say."""

    name: str
    """File name without suffix, and identifier in the page."""
    title: str
    caption: str
    """One or two sentences: what is seen, and how to read it."""
    figure: Figure
    tips: list[tuple[str, list[str]]] = field(default_factory=list)
    """Groups of marks by their gid, with a hover text for each mark, in drawing order."""

    def mark(self, gid: str, texts: Sequence[str]) -> str:
        """Give texts to the marks of an artist; returns the gid to draw it with."""
        self.tips.append((gid, list(texts)))
        return gid

    def svg(self) -> str:
        """The file's text; equal figures give equal text."""
        out = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none"}):
            FigureCanvasSVG(self.figure).print_svg(out, metadata={"Date": None, "Creator": None})
        return out.getvalue()

    def save_png(self, file: Path | io.BytesIO) -> None:
        canvas = FigureCanvasAgg(self.figure)
        before = self.figure.dpi
        self.figure.dpi = PNG_DPI
        try:
            canvas.print_png(file)
        finally:
            self.figure.dpi = before

    def inline(self, svg: str) -> str:
        """`svg` as an element of a page: own identifiers, colours as CSS variables, no XML header."""
        text = svg[svg.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
        text = re.sub(r'\bid="', f'id="{self.name}--', text)
        text = re.sub(r"url\(#", f"url(#{self.name}--", text)
        text = re.sub(r'xlink:href="#', f'href="#{self.name}--', text)
        text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
        # The shared font is the page's: sizes stay, families go.
        text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
        text = re.sub(r"(font-size: [\d.]+px; )?font-family: [^;\"]*;?", r"\1", text)
        text = re.sub(r"\n\s*", "\n", text)
        return re.sub(r"#[0-9a-f]{6}\b", _variable, text)


def _variable(match: re.Match[str]) -> str:
    name = VARIABLES.get(match[0])
    return f"var(--{name})" if name else match[0]


@contextmanager
def drawing(
    name: str, title: str, caption: str, *, height: float = 250, width: float = WIDTH, panels: int = 1
) -> Iterator[tuple[Picture, list[Axes]]]:
    """A picture and its axes side by side, in the common style; sizes are CSS pixels."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07)
        figure.set_layout_engine(layout)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        yield Picture(name, title, caption, figure), list(axes)
        layout.execute(figure)
        figure.set_layout_engine("none")  # the layout is done: saving twice need not repeat it


def kernel_color(kernel: int) -> str:
    return KERNELS.get(kernel) or OTHER_KERNELS[kernel // 2 % len(OTHER_KERNELS)]
