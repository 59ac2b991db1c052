"""Training curves of supernet and stand-alone network."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes

from bsnas.engine.runs.facts import Row, RunFacts
from bsnas.search.reporting.picture import BLUE, MUTED, SERIES, Picture, drawing


class Curve(NamedTuple):
    """One quantity of the metrics over epochs."""

    key: str
    title: str
    caption: str
    show: Callable[[float], str]


CURVES = (
    Curve("loss", "Loss", "Mean training loss of the epoch's paths.", "{:.4f}".format),
    Curve("top1", "Top-1 in training", "Share of training images right, augmented, over the paths.", "{:.2%}".format),
    Curve("learning_rate", "Learning rate", "At the end of each epoch.", "{:.4g}".format),
    Curve("images_per_s", "Images a second", "Of all processes; an image counts for every path.", "{:,.0f}".format),
    Curve("data_wait_share", "Waiting for data", "Share of the time in which no batch was ready.", "{:.1%}".format),
)


def training_pictures(run: RunFacts) -> Iterator[Picture]:
    """Curves of the supernet, shrink steps marked."""
    shrink = run.config.shrink
    for curve in CURVES:
        if any(curve.key in row for row in run.epochs):
            yield draw_curve("training", curve, [("", run.epochs)], shrink.step_epochs, shrink.total_epochs)


def retraining_pictures(run: RunFacts) -> Iterator[Picture]:
    """Curves of the stand-alone network."""
    for curve in CURVES:
        if any(curve.key in row for row in run.retrain_epochs):
            yield draw_curve("retraining", curve, [("", run.retrain_epochs)])


def draw_curve(
    prefix: str, curve: Curve, series: Sequence[tuple[str, Sequence[Row]]], steps: Sequence[int] = (), last: int = 0
) -> Picture:
    """One quantity of one or more runs over epochs."""
    name = f"{prefix}-{curve.key.replace('_', '-')}"
    with drawing(name, curve.title, curve.caption, height=210) as (picture, (axes,)):
        for number, (label, rows) in enumerate(series):
            rows = [row for row in rows if curve.key in row]
            if not rows:
                continue
            color = SERIES[number] if len(series) > 1 else BLUE
            epochs, values = [row["epoch"] for row in rows], [row[curve.key] for row in rows]
            axes.plot(epochs, values, color=color, label=label, ls="--" if number else "-")
            head = f"{label}\n" if label else ""
            tips = [f"{head}epoch {e}\n{curve.title} {curve.show(v)}" for e, v in zip(epochs, values, strict=True)]
            gid = picture.mark(f"points-{number}", tips)
            axes.plot(epochs, values, ls="", marker="o", ms=5, color=color, alpha=0 if len(rows) > 1 else 1, gid=gid)
        _mark_steps(axes, [step for step in steps if last])
        axes.set_xlabel("epoch")
        if last:
            axes.set_xlim(0, last)
        if curve.key != "learning_rate" and curve.key != "loss":
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: _short(curve, value))
        if len(series) > 1:
            axes.legend()
    return picture


def _short(curve: Curve, value: float) -> str:
    if curve.key in ("top1", "data_wait_share"):
        return f"{100 * value:.3g} %"
    return f"{value:,.6g}"


def _mark_steps(axes: Axes, steps: Sequence[int]) -> None:
    for number, epoch in enumerate(steps, 1):
        axes.axvline(epoch, color=MUTED, lw=0.9, ls=":")
        axes.annotate(
            f"shrink {number}",
            (epoch, 1.01),
            xycoords=("data", "axes fraction"),
            fontsize=9.5,
            color=MUTED,
            va="bottom",
            ha="center",
        )
