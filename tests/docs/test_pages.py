"""The pages themselves: the reference is current, links lead somewhere, and the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import generate_reference
from tests.docs.fenced import PAGES, ROOT


@pytest.fixture(scope="module")
def reference() -> str:
    return generate_reference.page()


def test_the_reference_of_options_is_current(reference: str) -> None:
    assert generate_reference.PAGE.read_text() == reference, "run python docs/generate_reference.py"


def test_the_reference_has_every_script_that_takes_options() -> None:
    files = [file for part in ("engine", "search", "benchmarks") for file in (ROOT / part).glob("*.py")]
    scripts = {file.relative_to(ROOT).as_posix() for file in files if "    arguments = parse(" in file.read_text()}
    assert scripts == set(generate_reference.SCRIPTS)


@pytest.mark.parametrize("script", ["engine/train.py", "search/evolve.py", "search/report.py"])
def test_the_reference_has_the_options_of_the_help(script: str, reference: str) -> None:
    text = reference.split(f"\n## {script}\n")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(--[\w.-]+)`", text, flags=re.M)) | {"--quiet", "--verbose", "--help"}
    said = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^│ (?:-h, )?(--[\w.-]+)", said.stdout, flags=re.M))
    assert documented == {name.replace(".no-", ".") for name in listed}  # the help names a switch that is on by its off


def test_links_of_pages_outside_the_site_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        targets = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", page.read_text())
        assert targets
        for target in (first or second for first, second in targets):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_paths_in_the_pages_exist() -> None:
    """Files and folders of the project; patterns and what lies in a run directory are none."""
    of_a_run = {"search/NAME.json", "search/best.json", "search/pareto.json"}
    path = re.compile(r"(?<![\w./-])(?:engine|kernels|search|benchmarks|tests|docs)/[\w./*-]*\w/?(?![\w*])")
    named = {(page.name, name) for page in PAGES for name in path.findall(page.read_text())}
    assert len(named) > 100
    assert not {(page, name) for page, name in named if name not in of_a_run and not (ROOT / name).exists()}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs")]
    done = subprocess.run([*command, str(tmp_path / "site")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/index.html").read_text()
    assert "tutorial-own-images.html" in page
    loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]+)\"", page)
    assert loaded == [], "the site needs no other host"
