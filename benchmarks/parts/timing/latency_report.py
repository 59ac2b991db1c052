"""How benchmarks/latency.py tells its rows: tables on the console, a CSV and a plot."""

import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bsnas.engine.host.atomic import write_atomically

BUSY = 1.1
"""Slowdown, median of all rows, from which the user is told that something else was running."""


def plot_latency(rows: Sequence[dict[str, Any]], file: Path) -> Path | None:
    """MACs against median latency, a panel per batch size. None where matplotlib is missing or nothing ran."""
    ran = [row for row in rows if "p50_ms" in row]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not ran:
        return None
    batches = sorted({row["batch"] for row in ran})
    figure = Figure(figsize=(4.5 * len(batches), 4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for way in sorted({(row["backend"], row["precision"]) for row in ran}):
            points = [r for r in ran if r["batch"] == batch and (r["backend"], r["precision"]) == way]
            axes.scatter([r["p50_ms"] for r in points], [r["macs"] / 1e6 for r in points], label=" ".join(way), s=18)
        for row in (r for r in ran if r["batch"] == batch):
            axes.annotate(row["network"], (row["p50_ms"], row["macs"] / 1e6), fontsize=6, alpha=0.7)
        axes.set(xlabel="median latency in ms", ylabel="M MACs", title=f"batch {batch}", xscale="log")
        axes.legend(fontsize=6)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    write_atomically(file, content.getvalue())
    return file


def show(rows: list[dict[str, Any]], engines: list[dict[str, Any]]) -> None:
    """Print both lists as tables."""
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 140)
    for hardware in dict.fromkeys(row["hardware"] for row in rows if "hardware" in row):
        print(hardware)
    table = Table(
        *("network", "backend", "precision", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s"),
        *("M MACs", "MB", "max error", "top-1 same"),
    )
    for row in rows:
        if "why" in row:
            continue
        head = [row["network"], row["backend"], row["precision"], str(row["batch"])]
        times = [f"{row[name]:.3f}" for name in ("p50_ms", "p90_ms", "p99_ms")]
        table.add_row(
            *(*head, *times, f"{row['images_per_s']:,.0f}", f"{row['macs'] / 1e6:.2f}"),
            *(f"{row['engine_bytes'] / 1e6:.2f}", f"{row['max_abs_error']:.1e}", f"{row['top1_agreement']:.1%}"),
        )
    console.print(table)
    slowdown = statistics.median([row.get("slowdown", 1.0) for row in rows] or [1.0])
    if slowdown > BUSY:
        print(f"the machine was busy: the median row took {slowdown:.2f} times what it took in its fastest pass")
    if engines:
        table = Table("engine built ahead of time", "target", "precision", "MB", "layers", "seconds")
        for row in engines:
            if "bytes" in row:
                figures = (f"{row['bytes'] / 1e6:.2f}", str(row["layers"]), f"{row['build_seconds']:.1f}")
                table.add_row(f"{row['backend']} {row['version']}", row["target"], row["precision"], *figures)
        console.print(table)
    for row in (*rows, *engines):
        if "why" in row:
            names = (name for name in ("network", "backend", "target", "precision") if name in row)
            print(" ".join(str(row[name]) for name in names), f"did not run: {row['why']}")
