"""Latency per backend and per block, and where the time went."""

from collections.abc import Iterator

from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.facts import Row, RunFacts
from bsnas.search.latency_tables.model import LatencyModel
from bsnas.search.latency_tables.network_parts import PartTable
from bsnas.search.reporting.picture import BLUE, FAINT, GREEN, INK, Picture, drawing


def latency_pictures(run: RunFacts) -> Iterator[Picture]:
    """Median latency of every backend that ran, and of every block where that was measured."""
    rows = [row for row in run.latency.get("rows", []) if "p50_ms" in row]
    if rows:
        yield draw_backends(rows)
    blocks = block_rows(run)
    if blocks:
        yield draw_blocks(blocks)


def block_rows(run: RunFacts) -> list[Row]:
    """Latency of every part of the chosen network by the run's newest latency table; empty where there is none."""
    if run.chosen is None or not run.latency_tables:
        return []
    try:
        model = LatencyModel.load(run.latency_tables[-1])
    except UserError as error:
        run.damaged.append(str(error))
        return []
    parts = PartTable(run.space).named_parts(run.chosen)
    table = run.latency_tables[-1].stem
    return [
        {"part": name, "form": str(part), "ms": model.parts[str(part)].ms, "table": table}
        for name, part in parts
        if str(part) in model.parts
    ]


def backend_name(row: Row) -> str:
    network = "" if row.get("network") in (None, "retrained", "inherited") else f"{row['network']}, "
    return f"{network}{row['backend']} {row['precision']}, batch {row['batch']}"


def draw_backends(rows: list[Row]) -> Picture:
    hardware = ". ".join(dict.fromkeys(str(row["hardware"]) for row in rows if "hardware" in row))
    caption = f"Time for one batch: bars are medians, lines reach to the 99th percentile. {hardware}"
    with drawing("latency", "Latency by backend", caption, height=70 + 24 * len(rows)) as (picture, (axes,)):
        for place, row in enumerate(rows):
            text = (
                f"{backend_name(row)}\np50 {row['p50_ms']:.3f} ms, p90 {row['p90_ms']:.3f}, p99 {row['p99_ms']:.3f}\n"
                f"{row['images_per_s']:,.0f} images/s"
            )
            axes.barh(place, row["p50_ms"], 0.6, color=BLUE, gid=None)
            axes.patches[-1].set_gid(picture.mark(f"row-{place}", [text]))
            axes.plot([row["p50_ms"], row["p99_ms"]], [place, place], color=INK, lw=1.2)
        axes.set_yticks(range(len(rows)), [backend_name(row) for row in rows], fontsize=10)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("ms a batch")
    return picture


def draw_blocks(rows: list[Row]) -> Picture:
    caption = f"What each part of the network adds, by the latency table {rows[0]['table']}."
    with drawing("latency-blocks", "Latency by block", caption, height=70 + 19 * len(rows)) as (picture, (axes,)):
        for place, row in enumerate(rows):
            axes.barh(place, row["ms"], 0.6, color=GREEN)
            axes.patches[-1].set_gid(picture.mark(f"block-{place}", [f"{row['form']}\n{row['ms']:.4f} ms"]))
        axes.set_yticks(range(len(rows)), [str(row["part"]) for row in rows], fontsize=10)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("ms")
    return picture


def time_pictures(run: RunFacts) -> Iterator[Picture]:
    """Seconds of every command that has ended."""
    seconds: dict[str, float] = {}
    for command in run.commands:
        if "seconds" in command:
            seconds[command["script"]] = seconds.get(command["script"], 0) + command["seconds"]
    if not seconds:
        return
    caption = "Wall-clock time of each script, all its calls together."
    with drawing("time", "Where the time went", caption, height=80 + 26 * len(seconds)) as (picture, (axes,)):
        for place, (script, value) in enumerate(seconds.items()):
            axes.barh(place, value / 60, 0.6, color=FAINT)
            axes.patches[-1].set_gid(picture.mark(f"script-{place}", [f"{script}\n{value:,.1f} s"]))
        axes.set_yticks(range(len(seconds)), list(seconds))
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.set_xlabel("minutes")
    yield picture
