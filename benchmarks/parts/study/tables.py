"""The tables and plots of a study: CSV, Markdown and SVG."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

from bsnas.benchmarks.parts.timing.turns import write_csv
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError

Results = dict[str, Any]
Seeds = Mapping[int, dict[str, Any]]
Pick = Callable[[dict[str, Any]], float | None]
BEGIN, END = "<!-- tables of benchmarks/study.py -->", "<!-- end of tables -->"
REFERENCE_CELL, REFERENCE_NETWORK = "base", "shrinking"

CELL_COLUMNS: dict[str, Pick] = {
    "random subnets": lambda part: statistics.median(part["random_top1"]["recalibrate"]),
    "running statistics": lambda part: statistics.median(part["random_top1"]["running"]),
    "tau": lambda part: _tau(part, "recalibrate"),
    "tau, running": lambda part: _tau(part, "running"),
    "best one-shot": lambda part: part["best"]["top1"],
    "retrained": lambda part: part["retrained_top1"],
}
"""Figures of a supernet: median one-shot top-1 of 20 random subnets with recalibrated and with running statistics,
Kendall's tau of both against networks trained alone, the best subnet found, and its test top-1 when retrained."""


def write_tables(figures: Results, directory: Path, page: Path | None) -> None:
    """CSV, Markdown and plots into the study's directory; the Markdown also into a page, between its marks."""
    from bsnas.benchmarks.parts.study.plots import write_plots

    text = f"{_provenance(figures)}\n\n{supernet_table(figures)}\n\n{network_table(figures)}\n"
    write_atomically(directory / "tables.md", text.encode())
    write_csv(directory / "supernets.csv", cell_rows(figures))
    write_csv(directory / "networks.csv", network_rows(figures))
    write_plots(figures, directory)
    if page is not None:
        fill_page(page, text)
    print(f"{text}\ntables and plots are in {directory}")


def fill_page(page: Path, text: str) -> None:
    """Put tables between a page's marks. Raises `UserError` when it has none."""
    held = page.read_text() if page.is_file() else ""
    if BEGIN not in held or END not in held:
        raise UserError(f"{page} has no lines {BEGIN!r} and {END!r} for the tables to stand between; add them")
    before, rest = held.split(BEGIN, 1)
    write_atomically(page, f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{rest.split(END, 1)[1]}".encode())


def cell_rows(figures: Results) -> list[dict[str, Any]]:
    """A row per supernet: all figures that a plot or another table may want."""
    return [
        {"cell": name, "seed": seed, "training_s": part["training_s"], "best_macs": part["best"]["macs"]}
        | {column: pick(part) for column, pick in CELL_COLUMNS.items()}
        for name, cell in figures["cells"].items()
        for seed, part in cell["seeds"].items()
    ]


def network_rows(figures: Results) -> list[dict[str, Any]]:
    """A row per network of nearly the same MACs: those that evolution found, and the baselines'."""
    found = [
        {"network": name, "seed": seed, "macs": part["best"]["macs"], "test_top1": part["retrained_top1"]}
        for name in (REFERENCE_NETWORK, REFERENCE_CELL)
        for seed, part in figures["cells"][name]["seeds"].items()
    ]
    others = [
        {"network": name, "seed": seed, "macs": part["macs"], "test_top1": part["test_top1"]}
        for name, baseline in figures["baselines"].items()
        for seed, part in baseline["seeds"].items()
    ]
    return found + others


def supernet_table(figures: Results) -> str:
    """A line per cell: mean over seeds, and for top-1 and tau the difference from the base with its interval."""
    base: Seeds = figures["cells"][REFERENCE_CELL]["seeds"]
    lines = []
    for cell in figures["cells"].values():
        if cell["seeds"]:
            values = [_cell_text(cell["seeds"], base, pick) for pick in CELL_COLUMNS.values()]
            minutes = statistics.mean(part["training_s"] for part in cell["seeds"].values()) / 60
            lines.append([cell["about"], str(len(cell["seeds"])), *values, f"{minutes:.1f}"])
    return _markdown(["supernet", "seeds", *CELL_COLUMNS, "minutes"], lines)


def network_table(figures: Results) -> str:
    """A line per kind of network: mean MACs and test top-1, and the difference from what the whole search found."""
    about = {
        REFERENCE_NETWORK: "evolution in the shrunk space",
        REFERENCE_CELL: "evolution in the full space, no shrinking",
        **{name: baseline["about"] for name, baseline in figures["baselines"].items()},
    }
    rows = network_rows(figures)
    top1 = {name: {r["seed"]: r["test_top1"] for r in rows if r["network"] == name} for name in about}
    lines = []
    for name, seeds in top1.items():
        if seeds:
            macs = statistics.mean(row["macs"] for row in rows if row["network"] == name)
            difference = "" if name == REFERENCE_NETWORK else _paired(seeds, top1[REFERENCE_NETWORK])
            spread = f"{min(seeds.values()):.4f} to {max(seeds.values()):.4f}"
            mean = f"{statistics.mean(seeds.values()):.4f}"
            lines.append([about[name], str(len(seeds)), f"{macs / 1e6:.2f} M", mean, spread, difference])
    return _markdown(["network", "seeds", "MACs", "test top-1", "lowest to highest", "against the first"], lines)


def _cell_text(seeds: Seeds, base: Seeds, pick: Pick) -> str:
    values = {seed: value for seed, part in seeds.items() if (value := pick(part)) is not None}
    if not values:
        return "none"
    mean = f"{statistics.mean(values.values()):.3f}"
    if seeds is base:
        return mean
    difference = _paired(values, {seed: pick(part) for seed, part in base.items()})
    return f"{mean} ({difference})" if difference else mean


def _paired(values: Mapping[int, float], reference: Mapping[int, float | None]) -> str:
    """Mean difference over the seeds that both have, with its 95 % interval (Student's t) where there are several."""
    differences = [v - r for seed, v in values.items() if (r := reference.get(seed)) is not None]
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.3f}"
    half = student_t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.3f} ± {half:.3f}"


def _tau(part: dict[str, Any], bn: str) -> float | None:
    return part["ranking"][bn]["kendall_tau"] if part["ranking"] else None


def _provenance(figures: Results) -> str:
    request = figures["request"]
    seeds, macs = (_pool_tau(figures, name) for name in ("seeds_agree", "macs_agree"))
    return (
        f"Commit {figures['commit']}, {figures['date'][:10]}. Limit {request['max_macs'] / 1e6:.2f} M MACs; "
        f"supernets of {request['base']['shrink']['first_epochs']} epochs, networks trained alone for "
        f"{request['base']['retrain']['epochs']}. Differences from the base are over equal seeds, with a 95 % interval."
        + (f" Tau of the base, a seed each: {', '.join(taus)}." if (taus := _base_taus(figures)) else "")
        + (f" Two trainings of the pool's networks with different seeds agree with tau {seeds}." if seeds else "")
        + (f" Their MACs rank them with tau {macs}." if macs else "")
    )


def _pool_tau(figures: Results, name: str) -> str:
    """Kendall's tau of two seeds of the pool, or of its MACs, with its interval."""
    pools = [part["pool"] for part in figures["cells"][REFERENCE_CELL]["seeds"].values() if part["pool"]]
    return _with_interval(pools[0][name]) if pools else ""


def _base_taus(figures: Results) -> list[str]:
    """Kendall's tau of the base's recalibrated scores, for each seed with its interval."""
    rankings = [part["ranking"] for part in figures["cells"][REFERENCE_CELL]["seeds"].values() if part["ranking"]]
    return [text for ranking in rankings if (text := _with_interval(ranking["recalibrate"]))]


def _with_interval(agree: dict[str, Any] | None) -> str:
    """Tau of an agreement and its interval; nothing where there is none."""
    if not agree or agree["kendall_tau"] is None:
        return ""
    low, high = agree["kendall_tau_interval"]
    return f"{agree['kendall_tau']:.2f} ({low:.2f} to {high:.2f})"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
