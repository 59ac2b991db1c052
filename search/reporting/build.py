"""From a run to its report: sections, files, page."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.console import Progress
from bsnas.engine.runs.facts import RunFacts
from bsnas.search.reporting.accuracy import accuracy_pictures, ranking_pictures
from bsnas.search.reporting.architecture import architecture_picture
from bsnas.search.reporting.costs import latency_pictures, time_pictures
from bsnas.search.reporting.evolution import evolution_pictures
from bsnas.search.reporting.page import Section, facts_html, page
from bsnas.search.reporting.picture import Picture
from bsnas.search.reporting.shrinking import shrinking_pictures
from bsnas.search.reporting.tables import Table, summary, tables
from bsnas.search.reporting.training import retraining_pictures, training_pictures

REFRESH_SECONDS = 20


def write_report(run: RunFacts, file: Path) -> list[Path]:
    """Write the page, and beside it a directory of pictures and tables. Returns all files."""
    sections = run_sections(run)
    return write_page(f"BS-NAS: {run.directory.path.name}", state(run), sections, file, running=is_running(run))


def run_sections(run: RunFacts) -> list[Section]:
    """What the report of one run holds, in the order of interest."""
    by_name = {table.name: table for table in tables(run)}

    def some(*names: str) -> list[Table]:
        return [by_name[name] for name in names if name in by_name]

    where, steps = escape(str(run.directory.path)), run.config.shrink.step_epochs
    sections = [
        Section("result", "Result", extra=facts_html(summary(run), str(run.chosen) if run.chosen else None)),
        Section(
            "architecture",
            "Architecture",
            pictures=list(_architecture(run)),
            tables=some("architecture"),
            missing=f"No architecture yet: <code>python search/evolve.py --run {where}</code>",
        ),
        Section(
            "search",
            "Search",
            pictures=list(evolution_pictures(run)),
            tables=some("pareto", "subnets"),
            missing=f"No search yet: <code>python search/evolve.py --run {where}</code>",
        ),
        Section(
            "shrinking",
            "Shrinking",
            "Operations of every block, alive and turned off, as in the paper's Figure 3. R is how much more often an "
            "operation occurs in the best third of the scored subnets than in the worst third.",
            pictures=list(shrinking_pictures(run)),
            tables=some("shrink-steps", "importance"),
            missing=f"The first step comes at epoch {steps[0]}." if steps else "No steps planned.",
        ),
        Section(
            "accuracy",
            "Accuracy of subnets",
            pictures=[*accuracy_pictures(run), *ranking_pictures(run)],
            tables=some("accuracy", "ranking"),
            missing="Subnets are scored before and after each shrink step.",
        ),
        Section(
            "training",
            "Training",
            pictures=list(training_pictures(run)),
            tables=some("training"),
            missing="The first epoch is not finished.",
        ),
        Section(
            "finals",
            "Finals",
            "The best networks of the search, trained alone: the better half of each rung goes on to the next. Their "
            "top-1 and loss are on the search-validation images.",
            tables=some("finals"),
            missing=f"None held: <code>python search/finals.py --run {where}</code>",
        ),
        Section(
            "retraining",
            "Stand-alone network",
            pictures=list(retraining_pictures(run)),
            tables=some("retraining"),
            missing=f"Not trained yet: <code>python engine/retrain.py --run {where}</code>",
        ),
        Section(
            "latency",
            "Latency",
            pictures=list(latency_pictures(run)),
            tables=some("latency", "latency-blocks"),
            missing=f"Not measured yet: <code>python benchmarks/latency.py --run {where}</code>",
        ),
        Section("cost", "Cost", pictures=list(time_pictures(run)), tables=some("cost", "commands")),
        Section("configuration", "Configuration", tables=some("configuration", "versions")),
    ]
    if run.damaged:
        sections.append(
            Section("damaged", "Unreadable", "These files of the run could not be read.", extra=_list(run.damaged))
        )
    return sections


def _architecture(run: RunFacts) -> Iterator[Picture]:
    if run.chosen is not None:
        yield architecture_picture(run.space, run.chosen, "Retrained" if run.retrained else "Best found")


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li><code>{escape(text)}</code></li>" for text in texts) + "</ul>"


def is_running(run: RunFacts) -> bool:
    owner = run.directory.owner()
    return owner is not None and owner.alive


def state(run: RunFacts) -> str:
    """One line on what the run is at, as HTML."""
    owner = run.directory.owner()
    preset = escape(run.config.preset)
    changed = f"preset {preset}, last change {utc(run.last_change())}"
    if owner is not None and owner.alive:
        activity = run.activity or {}
        doing = escape(activity.get("doing", "at work"))
        return f'<span class="running">In progress: {doing}</span>, {escape(owner.text)}, {changed}'
    return f"Nothing is running, {changed}"


def utc(seconds_since_1970: float) -> str:
    """`2026-01-31 12:00 UTC`: a page is read long after it was written."""
    return datetime.fromtimestamp(seconds_since_1970, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def write_page(title: str, state_html: str, sections: list[Section], file: Path, *, running: bool) -> list[Path]:
    """Write the page and, in a directory of its name beside it, every picture (SVG, PNG) and table (CSV)."""
    directory = file.with_suffix("")
    pictures = [p for s in sections for p in (*s.pictures, *(q for _, side in s.sides for q in side))]
    files = [file]
    svgs: dict[str, str] = {}
    with Progress("writing pictures", len(pictures), enabled=True) as bar:
        directory.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            svgs[picture.name] = picture.svg()
            png = directory / f"{picture.name}.png"
            write_atomically(png.with_suffix(".svg"), svgs[picture.name].encode())
            picture.save_png(png)
            files += [png.with_suffix(".svg"), png]
            bar.advance()
    for table in (table for section in sections for table in section.tables):
        write_atomically(directory / f"{table.name}.csv", table.csv().encode())
        files.append(directory / f"{table.name}.csv")
    where = f"Pictures as SVG and PNG, tables as CSV: {escape(directory.name)}/"
    foot = f"Written {utc(time.time())} by search/report.py. {where}"
    text = page(title, state_html, sections, svgs, running=running, refresh=REFRESH_SECONDS, foot=foot)
    write_atomically(file, text.encode())
    return files


def write_until_done(path: Path, file: Path, seconds: float) -> list[Path]:
    """Write the report again and again, until no process works on the run any more."""
    while True:
        run = RunFacts(path)
        running = is_running(run)
        files = write_report(run, file)
        if not running:
            return files
        time.sleep(seconds)


def renamed(pictures: Sequence[Picture], suffix: str) -> list[Picture]:
    """The pictures under other names, so that those of two runs fit in one page."""
    return [replace(picture, name=f"{picture.name}-{suffix}") for picture in pictures]
