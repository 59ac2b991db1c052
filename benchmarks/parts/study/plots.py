"""The pictures of a study: random subnets of every supernet, one-shot against stand-alone, networks of equal MACs."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bsnas.benchmarks.parts.study.tables import REFERENCE_CELL, Results, network_rows


def write_plots(figures: Results, directory: Path) -> None:
    """distribution.svg, ranking.svg and networks.svg, of what there is."""
    cells = {name: cell["seeds"] for name, cell in figures["cells"].items() if cell["seeds"]}
    if cells:
        _save(directory / "distribution.svg", lambda axes: _distribution(axes, cells), 2 + 0.3 * len(cells))
    base = cells.get(REFERENCE_CELL, {})
    if 0 in base and base[0]["pool"]:
        _save(directory / "ranking.svg", lambda axes: _ranking(axes, base[0]), 4)
    rows = network_rows(figures)
    if rows:
        _save(directory / "networks.svg", lambda axes: _networks(axes, rows), 4)


def _save(file: Path, draw: Any, height: float) -> None:
    figure, axes = plt.subplots(figsize=(7, height), layout="constrained")
    draw(axes)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _distribution(axes: Axes, cells: dict[str, Any]) -> None:
    """A box per supernet: random subnets of all seeds, recalibrated."""
    values = [[v for part in seeds.values() for v in part["random_top1"]["recalibrate"]] for seeds in cells.values()]
    axes.boxplot(values, orientation="horizontal", tick_labels=list(cells))
    axes.invert_yaxis()
    axes.set_xlabel("one-shot top-1 of random subnets")


def _ranking(axes: Axes, part: dict[str, Any]) -> None:
    """One-shot against stand-alone accuracy of the pool (paper, Figure 6)."""
    alone = [statistics.mean(values) for values in zip(*part["pool"]["top1_by_seed"], strict=True)]
    for bn, scores in part["pool_one_shot"].items():
        tau = part["ranking"][bn]["kendall_tau"]
        axes.scatter(scores, alone, label=f"{bn}, tau {tau:.2f}" if tau is not None else bn)
    axes.set_xlabel("one-shot top-1")
    axes.set_ylabel("test top-1, trained alone")
    axes.legend()


def _networks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Test top-1 against MACs, a mark per seed."""
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]
        label = {"shrinking": "evolution, shrunk space", "base": "evolution, full space"}.get(name, name)
        axes.scatter([row["macs"] / 1e6 for row in own], [row["test_top1"] for row in own], label=label)
    axes.set_xlabel("million MACs")
    axes.set_ylabel("test top-1")
    axes.legend(fontsize="small")
