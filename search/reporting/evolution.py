"""Progress of the evolution, and accuracy against multiply-adds with the Pareto front."""

from collections.abc import Iterator, Sequence

from matplotlib.ticker import MaxNLocator

from bsnas.engine.runs.facts import Row, RunFacts, Search, quantile
from bsnas.search.reporting.picture import BLUE, FAINT, INK, ORANGE, SERIES, STEPS, Picture, drawing


def evolution_pictures(run: RunFacts) -> Iterator[Picture]:
    """Of the newest search; the front is over all of the run's searches."""
    if run.searches and run.searches[-1].rows:
        yield draw_progress(run.searches[-1])
        yield draw_front([("", run)])


def describe(row: Row) -> str:
    """Hover text of a candidate."""
    lines = [f"top-1 {100 * row['top1']:.2f} %, {row['macs'] / 1e6:,.2f} M MACs, {row['params'] / 1e6:,.3f} M params"]
    lines += [f"{name} {row[name]:.3f}" for name in row if name.startswith("latency")]
    if "generation" in row:
        lines.append(f"generation {row['generation']}")
    return "\n".join([*lines, row["arch"].replace("_", "\n")])


def draw_progress(search: Search) -> Picture:
    generations = [rows for rows in search.generations if rows]
    planned = search.settings.get("iterations", len(generations) - 1)
    limits = ", ".join(search.limits.values()) or "no limits"
    caption = f"{len(search.rows):,} subnets, {limits}. Line: the best so far. Dashed: the median of a generation."
    with drawing("evolution", "Evolution", caption) as (picture, (axes,)):
        best: list[float] = []
        median: list[float] = []
        numbers: list[int] = []
        for number, rows in enumerate(generations):
            top1 = [100 * row["top1"] for row in rows]
            spread = [number + ((7 * index) % 11 - 5) * 0.045 for index in range(len(rows))]
            gid = picture.mark(f"generation-{number}", [describe({**row, "generation": number}) for row in rows])
            axes.plot(spread, top1, ls="", marker="o", ms=4, color=FAINT, mew=0, gid=gid)
            best.append(max([*best[-1:], *top1]))
            median.append(quantile(top1, 0.5))
            numbers.append(number)
        axes.plot(numbers, median, color=ORANGE, ls="--", lw=1.4, marker="_", ms=9, label="median")
        axes.step(numbers, best, where="post", color=BLUE, marker="_", ms=9, label="best so far")
        axes.set_xlim(-0.5, max(planned, 1) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("generation")
        axes.set_ylabel("one-shot top-1, %")
        axes.legend(loc="lower right")
    return picture


def draw_front(runs: Sequence[tuple[str, RunFacts]]) -> Picture:
    """All candidates of every run's searches with its front; candidates of several runs differ in colour."""
    alone = len(runs) == 1
    caption = (
        "Every subnet of the run's searches; the line joins those that no other beats in both. The ring is the "
        f"architecture that was chosen.{' Stronger colour: later generations.' if alone else ''}"
    )
    name, title = "pareto", "Accuracy against multiply-adds"
    with drawing(name if alone else "pareto-of-both", title, caption, height=280) as (picture, (axes,)):
        for number, (label, run) in enumerate(runs):
            color = SERIES[number]
            rows = [row for search in run.searches for row in search.rows]
            if not rows:
                continue
            last = max(row["generation"] for row in rows)
            for share in range(len(STEPS)) if alone else (0,):
                some = [row for row in rows if not alone or len(STEPS) * row["generation"] // (last + 1) == share]
                if not some:
                    continue
                x, y = _place(some)
                texts = [(f"{label}\n" if label else "") + describe(row) for row in some]
                gid = picture.mark(f"subnets-{number}-{share}", texts)
                shade = STEPS[share] if alone else color
                axes.plot(x, y, ls="", marker="o", ms=4.5, color=shade, alpha=0.8, mew=0, gid=gid)
            front = run.front or []
            if front:
                x, y = _place(front)
                axes.plot(x, y, color=ORANGE if alone else color, lw=1.6, label=label or "Pareto front", zorder=1)
            if run.best:
                x, y = _place([run.best])
                axes.plot(x, y, ls="", marker="o", ms=12, mfc="none", mec=INK, mew=1.6)
        axes.set_xlabel("MACs of the released network, M")
        axes.set_ylabel("one-shot top-1, %")
        axes.margins(0.06)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.97), ncols=2, borderaxespad=0)
    return picture


def _place(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["macs"] / 1e6 for row in rows], [100 * row["top1"] for row in rows]
