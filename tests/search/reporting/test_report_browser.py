"""The report in a real browser: opened from disk, no error, no request, hover and keyboard, phone and desktop."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bsnas.engine.runs.facts import RunFacts
from bsnas.search.reporting.build import write_report
from tests.search.finished_runs import finished_run, small_space

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium: apt-get install chromium (see CONTRIBUTING.md)"
)
SCREENS = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = finished_run(tmp_path_factory.mktemp("browser") / "run", small_space())
    write_report(RunFacts(path), path / "report.html")
    # Alone: what it shows must not come from the directory beside it.
    return Path(shutil.copy(path / "report.html", tmp_path_factory.mktemp("alone") / "report.html"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page with everything that it said and asked for."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def tip(self) -> str | None:
        return self.page.evaluate("tip.style.display === 'block' ? tip.textContent : null")


@pytest.fixture
def opened(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    width, scheme = getattr(request, "param", (1440, "light"))
    opened = Opened(browser, report, width, scheme)
    yield opened
    assert opened.said == []
    assert opened.asked == [report.as_uri()]
    opened.context.close()


@pytest.mark.parametrize("opened", SCREENS, indirect=True)
def test_it_fits_and_is_legible(opened: Opened) -> None:
    """No sideways scrolling, nothing drawn outside its card, and text that stands out from its background."""
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    width = page.evaluate("innerWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate("""[...document.querySelectorAll('.plot text')].filter(text => {
        const t = text.getBoundingClientRect(), card = text.closest('.picture').getBoundingClientRect();
        return t.left < card.left || t.right > card.right + 1; }).map(text => text.textContent)""")
    assert outside == []
    smallest = page.evaluate("""Math.min(...[...document.querySelectorAll('.plot text')].map(text =>
        parseFloat(getComputedStyle(text).fontSize) * text.getCTM().a || 99))""")
    assert smallest >= 8
    contrasts = page.evaluate(CONTRAST)
    assert min(contrasts.values()) >= 4.5, contrasts


CONTRAST = """(() => {
    const bright = color => { const c = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126*c[0] + 0.7152*c[1] + 0.0722*c[2]; };
    const ground = bright(getComputedStyle(document.querySelector('.picture')).backgroundColor), found = {};
    const all = document.querySelectorAll('.picture text, .picture p, .picture h3, td, th, dd, dt, summary');
    for (const element of all) {
        const style = getComputedStyle(element);
        const color = element.tagName === 'text' ? style.fill : style.color;
        const b = bright(color);
        found[color] = (Math.max(b, ground) + 0.05) / (Math.min(b, ground) + 0.05);
    }
    return found; })()"""


@pytest.mark.parametrize("opened", [(390, "light"), (1440, "dark")], indirect=True)
def test_hover_says_what_is_under_the_pointer(opened: Opened) -> None:
    page = opened.page
    plot = page.locator('.plot[data-name="shrink-step-1"]')
    plot.scroll_into_view_if_needed()
    mark = page.locator('[id="shrink-step-1--alive"] use').first
    box = mark.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    text = opened.tip()
    assert text is not None
    assert re.fullmatch(r"block 1: k\dt\dc\d+\nalive\nR = [+-]\d\.\d{3}", text)
    inside = page.evaluate("""(() => { const t = tip.getBoundingClientRect();
        return t.left >= 0 && t.top >= 0 && t.right <= innerWidth && t.bottom <= innerHeight; })()""")
    assert inside
    page.mouse.move(0, 0)
    assert opened.tip() is None


def test_every_mark_is_found_by_its_own_hover(opened: Opened) -> None:
    """Groups and texts are in the same order: the block and operation of a text lie where the dot is drawn."""
    page = opened.page
    found = page.evaluate("""(() => {
        const texts = JSON.parse(document.getElementById('tips').textContent)['shrink-step-1'];
        const uses = gid => [...document.getElementById('shrink-step-1--' + gid).querySelectorAll('use')];
        return texts.flatMap(([gid, tips]) => uses(gid).map(
            (use, i) => [parseInt(tips[i].split(' ')[1]), use.getBoundingClientRect().top]));
    })()""")
    by_block: dict[int, set[int]] = {}
    for block, top in found:
        by_block.setdefault(block, set()).add(round(top / 8))
    tops = [min(by_block[block]) for block in sorted(by_block)]
    assert tops == sorted(tops)
    assert all(max(rows) - min(rows) <= 1 for rows in by_block.values())


def test_the_keyboard_reaches_and_reads_everything(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    names = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.dataset.name || ''")
        names.add(name)
        if name == "evolution":
            break
    assert {"architecture", "evolution"} <= names
    page.keyboard.press("ArrowRight")
    first = opened.tip()
    page.keyboard.press("ArrowRight")
    second = opened.tip()
    assert first
    assert second
    assert first != second
    assert page.evaluate("document.getElementById('live').textContent") == second
    page.keyboard.press("End")
    assert "generation 3" in (opened.tip() or "")
    page.keyboard.press("Escape")
    assert opened.tip() is None


def test_tables_fold_open_and_are_saved(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    summary = page.locator("summary", has_text="Pareto front")
    summary.focus()
    page.keyboard.press("Enter")
    with page.expect_download() as download:
        page.locator('button[data-csv="pareto"]').click()
    download.value.save_as(tmp_path / "pareto.csv")
    assert (tmp_path / "pareto.csv").read_text().startswith("top1,macs,params,arch\n")
    with page.expect_download() as download:
        page.locator('button[data-svg="pareto"]').click()
    download.value.save_as(tmp_path / "pareto.svg")
    assert "var(--" not in (tmp_path / "pareto.svg").read_text()


def test_the_theme_button_turns_the_colours(opened: Opened) -> None:
    page = opened.page
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme").focus()
    page.keyboard.press("Enter")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert before != after
