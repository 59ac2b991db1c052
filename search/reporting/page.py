"""The page: HTML from pictures and tables, with style and script inside, so that one file is everything."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from bsnas.search.reporting.picture import Picture
from bsnas.search.reporting.tables import Table, show

HERE = Path(__file__).parent
NUMERIC = (int, float)


@dataclass
class Section:
    """A heading with what is below it; `missing` says how to get what is not there yet."""

    name: str
    title: str
    intro: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    extra: str = ""
    """HTML between introduction and pictures."""
    missing: str = ""
    sides: list[tuple[str, list[Picture]]] = field(default_factory=list)
    """Pictures of several runs, a column for each."""

    @property
    def empty(self) -> bool:
        return not (self.pictures or self.tables or self.extra or any(pictures for _, pictures in self.sides))


def page(
    title: str, state: str, sections: Sequence[Section], svgs: dict[str, str], *, running: bool, refresh: int, foot: str
) -> str:
    """The whole document. `svgs` holds the SVG text of every picture by its name."""
    css, script = ((HERE / name).read_text() for name in ("page.css", "page.js"))
    pictures = [p for s in sections for p in (*s.pictures, *(q for _, side in s.sides for q in side))]
    tips = json.dumps({p.name: p.tips for p in pictures}, separators=(",", ":")).replace("</", "<\\/")
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in sections)
    reload = '<button id="refresh" type="button">Stop refreshing</button>' if running else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{css}</style>
</head>
<body data-refresh="{refresh if running else 0}">
<a class="skip" href="#main">Skip to the report</a>
<header>
<h1>{escape(title)}</h1>
<p class="state">{state}</p>
</header>
<nav aria-label="Sections"><div>{links}<button id="theme" type="button">Light / dark</button>{reload}</div></nav>
<main id="main">
{"".join(_section(section, svgs) for section in sections)}</main>
<footer>{foot}</footer>
<div id="tip" role="tooltip"></div>
<div id="live" class="live" aria-live="polite"></div>
<script type="application/json" id="tips">{tips}</script>
<script>
{script}</script>
</body>
</html>
"""  # noqa: E501 - the policy is one attribute


def _section(section: Section, svgs: dict[str, str]) -> str:
    parts = [f'<section id="{section.name}" aria-labelledby="h-{section.name}">']
    parts.append(f'<h2 id="h-{section.name}">{escape(section.title)}</h2>')
    if section.intro:
        parts.append(f"<p>{escape(section.intro)}</p>")
    if section.empty:
        parts.append(f'<p class="missing">{section.missing or "Nothing yet."}</p></section>\n')
        return "\n".join(parts)
    parts.append(section.extra)
    tables = [table_html(table) for table in section.tables]
    if len(section.pictures) == 1 and section.tables and section.tables[0].unfolded:
        picture = _picture(section.pictures[0], svgs)
        parts.append(f'<div class="beside"><div>{picture}</div><div>{tables.pop(0)}</div></div>')
    elif section.pictures:
        parts.append(f'<div class="grid">{"".join(_picture(p, svgs) for p in section.pictures)}</div>')
    if section.sides:
        sides = (
            f'<div><h3>{escape(label)}</h3><div class="grid">'
            f"{''.join(_picture(p, svgs) for p in pictures) or MISSING_SIDE}</div></div>"
            for label, pictures in section.sides
        )
        parts.append(f'<div class="sides">{"".join(sides)}</div>')
    parts += tables
    return "\n".join([*filter(None, parts), "</section>\n"])


MISSING_SIDE = '<p class="missing">Nothing yet.</p>'


def _picture(picture: Picture, svgs: dict[str, str]) -> str:
    marks = sum(len(texts) for _, texts in picture.tips)
    help_ = f" {marks} marks: arrow keys step through them." if marks else ""
    label = escape(f"{picture.title}. {picture.caption}{help_}", quote=True)
    return (
        f'<figure class="picture"><figcaption><h3>{escape(picture.title)}</h3><p>{escape(picture.caption)}</p>'
        f'</figcaption><div class="plot" data-name="{picture.name}" tabindex="0" role="img" aria-label="{label}">'
        f"{picture.inline(svgs[picture.name])}</div>"
        f'<div class="tools"><button type="button" data-svg="{picture.name}" '
        f'aria-label="Save {escape(picture.title, quote=True)} as SVG">SVG</button></div></figure>'
    )


def table_html(table: Table, *, differing: Sequence[bool] = (), open_: bool = False) -> str:
    """A folded table; its CSV is in the page for the button. `differing` marks rows."""
    rows = table.rows[: table.shown]
    numeric = [
        any(isinstance(row[i], NUMERIC) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{_class("n" if number else "")}>{escape(column)}</th>'
        for column, number in zip(table.columns, numeric, strict=True)
    )
    body = "".join(
        f"<tr{_class('differs' if index < len(differing) and differing[index] else '')}>"
        + "".join(map(_cell, row))
        + "</tr>"
        for index, row in enumerate(rows)
    )
    count = f"{len(table.rows):,} rows" if len(rows) == len(table.rows) else f"{len(rows)} of {len(table.rows):,} rows"
    csv = table.csv().replace("</", "<\\/")
    opening = "<details open>" if open_ or table.unfolded else "<details>"
    return (
        f"{opening}<summary>{escape(table.title)} <small>({count})</small></summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title, quote=True)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<div class="tools"><button type="button" data-csv="{table.name}" '
        f'aria-label="Save {escape(table.title, quote=True)} as CSV">CSV</button></div>'
        f'<script type="text/csv" id="csv-{table.name}">{csv}</script></details>'
    )


def _cell(value: Any) -> str:
    text = escape(show(value))
    if isinstance(value, NUMERIC) and not isinstance(value, bool):
        return f'<td class="n">{text}</td>'
    return f"<td{_class('t' if len(text) > 30 else '')}>{text}</td>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def facts_html(facts: Sequence[tuple[str, str]], arch: str | None) -> str:
    """The summary as a list of cards, and the architecture as text."""
    cards = "".join(f'<div class="fact"><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>' for k, v in facts)
    text = f'<p class="arch">{escape(arch).replace("_", "_<wbr>")}</p>' if arch else ""
    return f'<dl class="facts">{cards}</dl>{text}'
