"""The tables of a report; each is shown in the page and written as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bsnas.engine.config import to_json
from bsnas.engine.host.console import duration
from bsnas.engine.runs.facts import Row, RunFacts, quantile
from bsnas.engine.space.cost import CostModel
from bsnas.search.reporting.accuracy import ranking_rows
from bsnas.search.reporting.costs import block_rows


@dataclass(frozen=True)
class Table:
    """Column names and rows of plain values."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    shown: int = 200
    """Most rows of it in the page; the file has all."""
    unfolded: bool = False
    """Whether the page shows it at once."""

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return out.getvalue()


def summary(run: RunFacts) -> list[tuple[str, str]]:
    """What the run came to, as name and value; what is not known yet is left out."""
    rows = []
    first, last = run.spaces[0].num_architectures, run.spaces[-1].num_architectures
    if run.retrained:
        rows.append(("Test top-1, retrained", f"{100 * run.retrained['test_top1']:.2f} %"))
    if run.best:
        rows.append(("One-shot top-1, best", f"{100 * run.best['top1']:.2f} %"))
    if run.chosen is not None:
        macs, params = CostModel(run.space).macs_and_params(run.chosen)
        rows.append(("Multiply-adds", f"{macs / 1e6:,.2f} M"))
        rows.append(("Parameters", f"{params / 1e6:,.3f} M"))
    fastest = [row for row in run.latency.get("rows", []) if row.get("batch") == 1 and "p50_ms" in row]
    if fastest:
        row = min(fastest, key=lambda r: r["p50_ms"])
        rows.append((f"Latency, {row['backend']} {row['precision']}", f"{row['p50_ms']:.3g} ms"))
    rows.append(("Space", f"{first:.2e}" if len(run.spaces) == 1 else f"{first:.2e} → {last:,.4g}"))
    if run.epochs:
        rows.append(("Epochs", f"{run.epochs[-1]['epoch']} of {run.config.shrink.total_epochs}"))
    if run.evaluations["subnets"]:
        rows.append(("Subnets scored", f"{run.evaluations['subnets']:,}"))
    seconds = sum(command.get("seconds", 0) for command in run.commands)
    if seconds:
        rows.append(("Time", duration(seconds)))
    return rows


def tables(run: RunFacts) -> Iterator[Table]:
    """Every table that the run has data for."""
    columns: tuple[str, ...]
    if run.chosen is not None:
        yield blocks(run)
    if run.front:
        columns = ("top1", "macs", "params", "arch")
        yield Table("pareto", "Pareto front", columns, [tuple(row[c] for c in columns) for row in run.front])
    candidates = [(search, row) for search in run.searches for row in search.rows]
    if candidates:
        candidates.sort(key=lambda pair: -pair[1]["top1"])
        columns = ("top1", "top5", "loss", "macs", "params", "generation", "arch")
        rows = [(*(row.get(c) for c in columns), search.file.stem) for search, row in candidates]
        yield Table("subnets", "Subnets of the searches", (*columns, "search"), rows, shown=25)
    if run.shrink_steps:
        yield shrink_steps(run)
        yield importance(run)
    if run.probes:
        yield probes(run)
    if run.epochs:
        yield metric_table("training", "Epochs of the supernet", run.epochs)
    if run.finals:
        columns = ("top1", "loss", "one_shot", "macs", "params", "arch")
        rows = [
            (number, rung["epochs"], *(row.get(c) for c in columns))
            for number, rung in enumerate(run.finals["rungs"], 1)
            for row in rung["networks"]
        ]
        yield Table("finals", "Networks of the finals", ("rung", "epochs", *columns), rows, unfolded=True)
    if run.retrain_epochs:
        yield metric_table("retraining", "Epochs of the stand-alone network", run.retrain_epochs)
    ranked = ranking_rows(run)
    if ranked:
        columns = ("one_shot", "stand_alone", "arch")
        rows = [tuple(row[c] for c in columns) for row in ranked]
        yield Table("ranking", "One-shot against stand-alone", columns, rows)
    if run.latency.get("rows"):
        columns = (
            "network", "backend", "precision", "batch", "p50_ms", "p90_ms", "p99_ms", "images_per_s", "max_abs_error",
            "top1_agreement", "why",
        )  # fmt: skip
        rows = [tuple(row.get(c) for c in columns) for row in run.latency["rows"]]
        yield Table("latency", "Latency and parity by backend", columns, rows)
    parts = block_rows(run)
    if parts:
        columns = ("part", "form", "ms", "table")
        yield Table("latency-blocks", "Latency by block", columns, [tuple(row[c] for c in columns) for row in parts])
    yield costs(run)
    if run.commands:
        yield commands(run)
    yield Table("configuration", "Configuration", ("option", "value"), configuration(run))
    if run.commands:
        yield versions(run)


def blocks(run: RunFacts) -> Table:
    arch = run.chosen
    assert arch is not None
    rows = [
        (
            number, str(op), plan.layers[0].inputs if plan.layers else channels, plan.hidden, channels, plan.kernel,
            plan.stride, plan.shortcut is not None,
        )
        for number, (plan, (op, channels)) in enumerate(
            zip(run.space.released_plans(arch), arch.operations, strict=True), start=1
        )
    ]  # fmt: skip
    columns = ("block", "choice", "in", "hidden", "out", "kernel", "stride", "shortcut")
    return Table("architecture", "Blocks of the architecture", columns, rows, unfolded=True)


def shrink_steps(run: RunFacts) -> Table:
    rows = [
        (
            step.number, run.config.shrink.step_epochs[step.number - 1], len(step.archs), step.keep,
            sum(map(len, step.before.live)), sum(map(len, step.after.live)) if step.after else None,
            step.before.num_architectures, step.after.num_architectures if step.after else None,
        )
        for step in run.shrink_steps
    ]  # fmt: skip
    columns = (
        "step", "epoch", "subnets scored", "keep", "operations before", "operations after", "architectures before",
        "architectures after",
    )  # fmt: skip
    return Table("shrink-steps", "Shrink steps", columns, rows)


def importance(run: RunFacts) -> Table:
    rows = [
        (step.number, block + 1, str(op), ratio, step.after is None or op in step.after.live[block])
        for step in run.shrink_steps
        for block, ratios in enumerate(step.importance)
        for op, ratio in ratios.items()
    ]
    columns = ("step", "block", "operation", "R", "alive after")
    return Table("importance", "Importance of every operation", columns, rows, shown=20)


def probes(run: RunFacts) -> Table:
    rows = [
        (p["epoch"], p["when"], min(p["top1"]), *(quantile(p["top1"], q) for q in (0.25, 0.5, 0.75)), max(p["top1"]))
        for p in run.probes
    ]
    columns = ("epoch", "when", "min", "quarter", "median", "three quarters", "max")
    return Table("accuracy", "One-shot top-1 of random subnets", columns, rows)


def metric_table(name: str, title: str, epochs: Sequence[Row]) -> Table:
    columns = tuple(dict.fromkeys(key for row in epochs for key in row if key not in ("kind", "time")))
    return Table(name, title, columns, [tuple(row.get(c) for c in columns) for row in epochs], shown=12)


def costs(run: RunFacts) -> Table:
    """What was computed: images through forward and backward, subnets and model-images scored, time and energy."""
    rows: list[tuple[str, Any, str]] = []
    for name, epochs in (("supernet training", run.epochs), ("retraining", run.retrain_epochs)):
        timed = [row for row in epochs if "seconds" in row and "images_per_s" in row]
        if timed:
            rows.append((f"{name}: time", sum(row["seconds"] for row in timed), "s"))
            rows.append((f"{name}: images", round(sum(r["seconds"] * r["images_per_s"] for r in timed)), "images"))
    rows.append(("subnets scored", run.evaluations["subnets"], "subnets"))
    rows.append(("images through subnets", run.evaluations["images"], "images"))
    for script in dict.fromkeys(command["script"] for command in run.commands):
        mine = [command for command in run.commands if command["script"] == script]
        rows.append((f"{script}: time of all calls", sum(c.get("seconds", 0) for c in mine), "s"))
        joules = [c["joules_of_main_device"] for c in mine if "joules_of_main_device" in c]
        if joules:
            rows.append((f"{script}: energy of the main process's device", sum(joules), "J"))
    return Table("cost", "Cost", ("what", "amount", "unit"), rows)


def commands(run: RunFacts) -> Table:
    columns = ("time", "script", "seconds", "outcome", "processes", "hardware", "commit", "command")
    rows = [tuple(command.get(c) for c in columns) for command in run.commands]
    return Table("commands", "Commands", columns, rows)


def versions(run: RunFacts) -> Table:
    names = dict.fromkeys(name for command in run.commands for name in command.get("versions", {}))
    rows = [
        (name, ", ".join(dict.fromkeys(c["versions"][name] for c in run.commands if name in c.get("versions", {}))))
        for name in names
    ]
    return Table("versions", "Versions", ("package", "version"), rows)


def configuration(run: RunFacts) -> list[tuple[str, Any]]:
    """Every option of the run by its name on the command line; the space is drawn elsewhere."""
    return list(_flat({key: value for key, value in to_json(run.config).items() if key != "space"}))


def _flat(values: Row, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', '-')}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield name, " ".join(map(str, value)) if isinstance(value, list) else value


def show(value: Any) -> str:
    """A value as the page shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**12 else f"{value:.3e}"
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) >= 1e-3 or not value else f"{value:.2e}"
    return str(value)
