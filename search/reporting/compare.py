"""Two runs side by side, with what differs marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bsnas.engine.runs.facts import RunFacts
from bsnas.search.reporting.build import is_running, renamed, run_sections, write_page
from bsnas.search.reporting.evolution import draw_front
from bsnas.search.reporting.page import Section, table_html
from bsnas.search.reporting.tables import Table, configuration, summary
from bsnas.search.reporting.training import CURVES, draw_curve

Pair = tuple[str, Any, Any]


def write_comparison(runs: Sequence[RunFacts], file: Path) -> list[Path]:
    """Write the page of two runs: training curves and fronts are overlaid, other pictures set side by side."""
    names = labels(runs)
    results = difference_table("comparison", "Results", names, pairs(*(summary(run) for run in runs)))
    options = difference_table("options", "Configuration", names, pairs(*(configuration(run) for run in runs)))
    sections = [
        Section(
            "result",
            "Result",
            "Rows that differ are marked with ≠ and a colour.",
            extra=table_html(results, differing=differing(results), open_=True),
        ),
        Section(
            "options",
            "Configuration",
            extra=table_html(only_differing(options), differing=[True] * len(options.rows), open_=True)
            + table_html(options, differing=differing(options)),
        ),
        Section("curves", "Training", pictures=overlaid(runs, names)),
    ]
    fronts = [(name, run) for name, run in zip(names, runs, strict=True) if run.searches]
    sections.append(
        Section(
            "front", "Search", pictures=[draw_front(fronts)] if len(fronts) > 1 else [], missing="Not in both runs."
        )
    )
    both = [{section.name: section for section in run_sections(run)} for run in runs]
    for name in ("architecture", "search", "shrinking", "accuracy", "latency", "cost"):
        sides = [
            (label, renamed(parts[name].pictures, f"run{number}"))
            for number, (label, parts) in enumerate(zip(names, both, strict=True), 1)
        ]
        first = both[0][name]
        title = "Evolution" if name == "search" else first.title
        sections.append(Section(name, title, first.intro, sides=sides))
    running = any(is_running(run) for run in runs)
    state = "Two runs side by side."
    files = write_page(f"BS-NAS: {names[0]} and {names[1]}", state, sections, file, running=running)
    for table in (results, options):
        target = file.with_suffix("") / f"{table.name}.csv"
        target.write_text(table.csv())
        files.append(target)
    return files


def labels(runs: Sequence[RunFacts]) -> list[str]:
    """Short names of the runs that differ from one another."""
    names = [run.directory.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.directory.path) for run in runs]


def pairs(first: Sequence[tuple[str, Any]], second: Sequence[tuple[str, Any]]) -> list[Pair]:
    """Values of both by their names; None where one has none."""
    left, right = dict(first), dict(second)
    return [(name, left.get(name), right.get(name)) for name in dict.fromkeys([*left, *right])]


def difference_table(name: str, title: str, names: Sequence[str], rows: Sequence[Pair]) -> Table:
    table = [(what, a, b, "≠" if a != b else "") for what, a, b in rows]
    return Table(name, title, ("", *names, "differs"), table)


def differing(table: Table) -> list[bool]:
    return [bool(row[-1]) for row in table.rows]


def only_differing(table: Table) -> Table:
    rows = [row for row in table.rows if row[-1]]
    return Table(f"{table.name}-differing", f"{table.title}: what differs", table.columns, rows)


def overlaid(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Any]:
    """Every training curve of both runs in one picture."""
    pictures = []
    for curve in CURVES:
        series = [
            (name, [row for row in run.epochs if curve.key in row]) for name, run in zip(names, runs, strict=True)
        ]
        if all(rows for _, rows in series):
            pictures.append(draw_curve("both", curve, series, last=max(run.config.shrink.total_epochs for run in runs)))
    return pictures
