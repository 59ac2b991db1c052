"""The report's content, from made-up runs: what pictures and tables say, runs in progress, two runs, size and time."""

import csv
import io
import itertools
import json
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.space.spaces import space_named
from bsnas.search.latency_tables.model import find_model
from bsnas.search.report import ReportArguments, write
from bsnas.search.reporting.accuracy import bin_edges
from bsnas.search.reporting.architecture import bars_of, mobilenet_bars
from bsnas.search.reporting.build import run_sections, state, write_report
from bsnas.search.reporting.picture import Picture, kernel_color
from bsnas.search.reporting.shrinking import shrinking_pictures
from bsnas.search.reporting.tensorboard import write_search_events
from tests import ROOT
from tests.search.finished_runs import PAPER, finished_run, small_space


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("report") / "run", small_space())


@pytest.fixture(scope="module")
def report(run: Path) -> str:
    write_report(RunFacts(run), run / "report.html")
    return (run / "report.html").read_text()


def pictures(facts: RunFacts) -> list[Picture]:
    return [picture for section in run_sections(facts) for picture in section.pictures]


def rows(file: Path) -> list[dict[str, str]]:
    with open(file) as handle:
        return list(csv.DictReader(handle))


def test_every_picture_is_an_svg_a_png_and_a_part_of_the_page(run: Path, report: str) -> None:
    drawn = pictures(RunFacts(run))
    assert {p.name for p in drawn} >= {
        "architecture", "evolution", "pareto", "shrink-step-1", "shrink-step-3", "accuracy-by-step", "ranking",
        "accuracy-of-scored", "training-loss", "retraining-top1", "latency", "latency-blocks", "time",
    }  # fmt: skip
    for picture in drawn:
        ElementTree.parse(run / "report" / f"{picture.name}.svg")
        assert (run / "report" / f"{picture.name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f'data-name="{picture.name}"' in report


def test_nothing_in_the_page_points_outside_it(report: str) -> None:
    links = set(re.findall(r"(?:href|src|url)\s*[=(]\s*[\"']?([^\"'() >]+)", report))
    own = {link for link in links if link.startswith(("#", "data:"))}
    assert {"#main", "data:,"} <= own
    assert links - own == {"URL.createObjectURL"}, "the script's link to a file that it has made itself"
    assert set(re.findall(r"\w+://[^/\s]+", report)) <= {"http://www.w3.org"}, "names of XML dialects, never fetched"


def test_a_mark_has_its_own_text(run: Path) -> None:
    """As many marks in the drawing as texts, and one identifier for each group in the whole page."""
    for picture in pictures(RunFacts(run)):
        tree = ElementTree.fromstring(picture.svg())
        groups = {element.get("id"): element for element in tree.iter() if element.get("id")}
        for gid, texts in picture.tips:
            marks = [e for e in groups[gid].iter() if e.tag.endswith("}use")] or [
                e for e in groups[gid].iter() if e.tag.endswith("}path")
            ]
            assert len(marks) == len(texts), (picture.name, gid)


def test_equal_runs_give_equal_pictures(run: Path) -> None:
    first, second = ([picture.svg() for picture in pictures(RunFacts(run)) if picture.name != "time"] for _ in range(2))
    assert first == second


def test_shrinking_shows_what_the_step_did(run: Path) -> None:
    facts = RunFacts(run)
    for step, picture in zip(facts.shrink_steps, shrinking_pictures(facts), strict=True):
        tips = dict(picture.tips)
        assert step.after is not None
        assert len(tips["alive"]) == sum(map(len, step.after.live))
        assert len(tips["off"]) == sum(map(len, step.before.live)) - len(tips["alive"])
        operation, ratio = next(iter(step.importance[0].items()))
        texts = [text for text in tips["alive"] + tips["off"] if text.startswith(f"block 1: {operation}\n")]
        assert texts == [next(t for t in texts if t.endswith(f"R = {ratio:+.3f}"))]


def test_tables_hold_the_values_of_the_run(run: Path, report: str) -> None:
    facts = RunFacts(run)
    subnets = rows(run / "report/subnets.csv")
    assert len(subnets) == sum(map(len, facts.searches[0].generations))
    assert float(subnets[0]["top1"]) == max(row["top1"] for row in facts.searches[0].rows)
    importance = rows(run / "report/importance.csv")
    assert len(importance) == sum(len(block) for step in facts.shrink_steps for block in step.importance)
    cost = {row["what"]: float(row["amount"]) for row in rows(run / "report/cost.csv")}
    assert cost["train: time of all calls"] == 3600
    assert cost["train: energy of the main process's device"] == 360_000
    assert cost["supernet training: time"] == 12.5 * len(facts.epochs)
    options = {row["option"]: row["value"] for row in rows(run / "report/configuration.csv")}
    assert options["optimizer.learning-rate"] == "0.1"
    assert options["shrink.keep"] == "9 5 3"
    assert "0123456789" in (run / "report/commands.csv").read_text()
    assert "train.py --run &lt;here&gt;" in report
    assert "<here>" not in report.replace("--run <here>", "", 1) or report.count("<here>") == 3


def test_latency_by_block_is_the_tables(run: Path, report: str) -> None:
    facts = RunFacts(run)
    assert facts.chosen is not None
    _, model = find_model(RunDir(run), None, {})
    parts = rows(run / "report/latency-blocks.csv")
    assert [row["part"] for row in parts] == ["stem", *(f"block {i}" for i in range(1, 6)), "tail"]
    total = model.offset_ms + sum(float(row["ms"]) for row in parts)
    assert total == pytest.approx(model.cost(facts.space)(facts.chosen))


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 200), min_size=1, max_size=300), st.sampled_from((24, 40)), st.sampled_from((50, 200, 359))
)
def test_bins_hold_all_values_and_equally_many_levels(correct: list[int], most: int, images: int) -> None:
    values = [100 * c / images for c in correct]
    edges = bin_edges(values, most)
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == len(values)
    assert len(edges) - 1 <= most
    if len(set(correct)) > 1:
        step = 100 / images * min(b - a for a, b in itertools.pairwise(sorted(set(correct))))
        steps_per_bin = (edges[1] - edges[0]) / step
        assert steps_per_bin == pytest.approx(max(1, round(steps_per_bin)), rel=1e-3)


def test_a_search_is_written_for_tensorboard_once(run: Path) -> None:
    facts = RunFacts(run)
    for _ in range(2):
        directory = write_search_events(facts)
    assert directory is not None
    events = EventAccumulator(str(directory), size_guidance={"histograms": 0}).Reload()
    best = [event.value for event in events.Scalars("search/best_top1")]
    expected = [max(row["top1"] for row in rows) for rows in facts.searches[-1].generations]
    assert best == pytest.approx([max(expected[: i + 1]) for i in range(len(expected))])
    assert [event.step for event in events.Histograms("search/top1")] == list(range(len(expected)))
    (image,) = events.Images("search/architecture")
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    blue = tuple(int(kernel_color(3)[i : i + 2], 16) for i in (1, 3, 5))
    assert (pixels == blue).all(2).sum() > 1000, "bars of 3x3 kernels"


def test_mobilenet_v2_is_drawn_as_it_is() -> None:
    """Its first block is no choice of our spaces but the stem's separable block; all others are the preset's."""
    space = space_named("mobilenet-v2")
    arch = fair_round(space, 0, 0)[0]
    expected = [bar[:4] for bar in bars_of(space, arch)]
    first, *others = [bar[:4] for bar in mobilenet_bars()]
    assert others == expected
    assert first == (space.entry_channels, 3, 1, 1)


def test_a_run_that_has_just_begun_has_a_report(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(run / "config.json", tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text('{"kind": "epoch", "epo')
    write_report(RunFacts(tmp_path / "run"), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "The first step comes at epoch 6." in text
    assert "The first epoch is not finished." in text
    assert 'data-refresh="0"' in text


def test_a_run_at_work_refreshes_itself(run: Path, tmp_path: Path) -> None:
    """Another process holds the lock; the report neither takes it nor waits for it."""
    path = tmp_path / "run"
    shutil.copytree(run, path)
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        (path / "lock").write_text(f"process {process.pid} on {socket.gethostname()}\n")
        note = {"doing": "training", "done": 3, "total": 9, "unit": "epochs", "started": 0, "time": time.time()}
        (path / "activity.json").write_text(json.dumps(note))
        write_report(RunFacts(path), path / "report.html")
        process.communicate(b"\n")
    text = (path / "report.html").read_text()
    assert "In progress: training" in text
    assert re.search(r'data-refresh="[1-9]', text)
    assert "Nothing is running" in state(RunFacts(path))


def test_damaged_files_are_named_and_the_rest_is_shown(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    (path / "latency/latency.json").write_text('{"rows": [')
    (path / "evaluations.sqlite").write_text("no database")
    write_report(RunFacts(path), path / "report.html")
    text = (path / "report.html").read_text()
    assert "latency/latency.json: " in text
    assert "evaluations.sqlite: file is not a database" in text
    assert 'data-name="pareto"' in text


def test_two_runs_are_compared_with_differences_marked(run: Path, tmp_path: Path) -> None:
    other = finished_run(tmp_path / "other", small_space(), seed=1)
    files = write(ReportArguments(run=(run, other), output=tmp_path / "both.html"))
    options = {row[""]: row for row in rows(tmp_path / "both/options.csv")}
    assert options["seed"] == {"": "seed", "run": "0", "other": "1", "differs": "≠"}
    assert options["optimizer.batch-size"]["differs"] == ""
    results = {row[""]: row for row in rows(tmp_path / "both/comparison.csv")}
    assert results["One-shot top-1, best"]["differs"] == "≠"
    assert results["Test top-1, retrained"]["differs"] == ""
    names = {file.stem for file in files if file.suffix == ".svg"}
    assert {"both-loss", "pareto-of-both", "shrink-step-2-run1", "shrink-step-2-run2"} <= names
    text = (tmp_path / "both.html").read_text()
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers))


@pytest.mark.slow
def test_a_run_of_the_papers_size_is_quick_and_small(tmp_path: Path) -> None:
    """6,400 subnets scored by shrink steps and 1,575 by the search: below 5 MB, and below 10 s of one quiet core."""
    path = finished_run(tmp_path / "run", space_named("imagenet"), PAPER)
    assert sum(len(step.archs) for step in RunFacts(path).shrink_steps) >= 6400
    command = [sys.executable, str(ROOT / "search/report.py"), "--run", str(path), "--json", str(tmp_path / "f.json")]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert seconds < 30, "a third of it on a machine that does nothing else"
    figures: dict[str, Any] = json.loads((tmp_path / "f.json").read_text())
    assert figures["bytes"] < 5e6
    assert "report in" in done.stdout


def test_three_runs_and_no_run_are_refused(tmp_path: Path) -> None:
    for arguments, message in (
        (["--run", "a", "--run", "b", "--run", "c"], "3 runs given; give --run once, or twice"),
        (["--run", str(tmp_path)], "holds no run (config.json is missing)"),
        (["--run", str(tmp_path), "--watch", "0"], "--watch 0.0: give seconds above 0"),
    ):
        command = [sys.executable, str(ROOT / "search/report.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
