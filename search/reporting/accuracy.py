"""Distributions of one-shot accuracy over the training (Figure 5), and one-shot against stand-alone (Figure 6)."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bsnas.engine.runs.facts import Row, RunFacts, quantile
from bsnas.search.reporting.picture import BLUE, INK, MUTED, ORANGE, STEPS, Picture, drawing


def accuracy_pictures(run: RunFacts) -> Iterator[Picture]:
    """Random subnets at every shrink step, and all subnets that the steps scored."""
    if run.probes:
        yield draw_probes(run)
    if run.shrink_steps:
        yield draw_scored(run)


def draw_probes(run: RunFacts) -> Picture:
    probes = run.probes
    caption = (
        f"One-shot top-1 of {len(probes[0]['top1'])} random subnets, drawn anew from the space of the moment. The bar "
        "is the median, the box holds the middle half."
    )
    title = "Random subnets, step by step (Figure 5)"
    with drawing("accuracy-by-step", title, caption, height=270) as (picture, (axes,)):
        for place, probe in enumerate(probes):
            top1 = [100 * value for value in probe["top1"]]
            color = BLUE if probe["when"].startswith("after") or probe["when"] == "final" else ORANGE
            low, high = quantile(top1, 0.25), quantile(top1, 0.75)
            axes.bar(place, high - low, 0.62, low, color=color, alpha=0.22)
            axes.plot([place - 0.31, place + 0.31], [quantile(top1, 0.5)] * 2, color=INK, lw=1.8)
            shift = [(index % 7 - 3) * 0.07 for index in range(len(top1))]
            tips = [f"{probe['when']}\n{value:.2f} %" for value in top1]
            gid = picture.mark(f"probe-{place}", tips)
            axes.plot(
                [place + s for s in shift], top1, ls="", marker="o", ms=4.5, color=color, alpha=0.75, mew=0, gid=gid
            )
        names = [probe["when"].replace(" step ", "\nstep ") for probe in probes]
        axes.set_xticks(range(len(probes)), names, fontsize=8.8)
        axes.set_xlim(-0.6, max(len(probes) - 0.4, 2.4))
        axes.grid(False, axis="x")
        axes.set_ylabel("top-1, %")
    return picture


def draw_scored(run: RunFacts) -> Picture:
    steps = run.shrink_steps
    everything = [100 * value for step in steps for value in step.top1]
    edges = bin_edges(everything, 40 if len(everything) > 1500 else 24)
    caption = "Every subnet that a shrink step scored, as a share of that step's. Later steps have the stronger colour."
    title = f"All {len(everything):,} scored subnets"
    with drawing("accuracy-of-scored", title, caption, height=270) as (picture, (axes,)):
        for step in steps:
            counts, _ = np.histogram([100 * value for value in step.top1], edges)
            shares = 100 * counts / counts.sum()
            color = STEPS[min(step.number, len(STEPS) - 1)]
            axes.stairs(shares, edges, color=color, fill=True, alpha=0.18)
            axes.stairs(shares, edges, color=color, lw=1.6, label=f"step {step.number}: {len(step.top1):,} subnets")
            centers = (edges[1:] + edges[:-1]) / 2
            filled = counts > 0
            tips = [
                f"step {step.number}\ntop-1 {low:.2f} to {high:.2f} %\n{count:,} subnets, {share:.1f} %"
                for low, high, count, share in zip(edges, edges[1:], counts, shares, strict=False)
                if count
            ]
            gid = picture.mark(f"step-{step.number}", tips)
            axes.plot(centers[filled], shares[filled], ls="", marker="o", ms=3, color=color, gid=gid)
        axes.set_xlabel("one-shot top-1, %")
        axes.set_ylabel("share of subnets, %")
        axes.legend(loc="upper left")
    return picture


def bin_edges(values: Sequence[float], most: int) -> npt.NDArray[np.float64]:
    """Edges of at most `most` bins that each hold as many of the values' steps: top-1 moves by an image at a time."""
    levels = np.unique(np.round(values, 6))
    if len(levels) == 1:
        return np.array([levels[0] - 0.5, levels[0] + 0.5])
    step = np.diff(levels).min()
    count = math.ceil((levels[-1] - levels[0]) / step + 0.5)
    steps_per_bin = math.ceil(count / most)
    return levels[0] - step / 2 + steps_per_bin * step * np.arange(math.ceil(count / steps_per_bin) + 1)


def ranking_pictures(run: RunFacts) -> Iterator[Picture]:
    """One-shot against stand-alone accuracy, when a ranking study has been made."""
    rows = ranking_rows(run)
    if len(rows) < 2:
        return
    tau = run.ranking.get("kendall_tau")
    interval = run.ranking.get("confidence_interval")
    text = "" if tau is None else f" Kendall tau {tau:.2f}"
    if interval:
        text += f" ({interval[0]:.2f} to {interval[1]:.2f})"
    caption = f"{len(rows)} subnets with inherited weights, and trained from scratch.{text}"
    with drawing("ranking", "One-shot against stand-alone (Figure 6)", caption) as (picture, (axes,)):
        x, y = [100 * row["one_shot"] for row in rows], [100 * row["stand_alone"] for row in rows]
        tips = [
            f"one-shot {a:.2f} %\nstand-alone {b:.2f} %\n{row['arch']}" for row, a, b in zip(rows, x, y, strict=True)
        ]
        axes.plot(x, y, ls="", marker="o", ms=7, color=BLUE, mew=0, gid=picture.mark("subnets", tips))
        axes.set_xlabel("one-shot top-1, %")
        axes.set_ylabel("stand-alone top-1, %")
        axes.margins(0.12)
        if tau is not None:
            axes.text(0.02, 0.98, text.strip(), transform=axes.transAxes, va="top", fontsize=9, color=MUTED)
    yield picture


def ranking_rows(run: RunFacts) -> list[Row]:
    """Rows of benchmarks/ranking.py with arch, one_shot and stand_alone."""
    return [row for row in run.ranking.get("archs", []) if {"arch", "one_shot", "stand_alone"} <= row.keys()]
