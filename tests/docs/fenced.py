"""Fenced blocks of README and docs, and the commands in them.

A block's language may be followed by what a test does with it: `run` executes it on a tiny run, `check` only parses it
with the script's own parser, `shown` does nothing (clusters, servers). Commands in other blocks count as `check`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests import ROOT

PAGES = [
    ROOT / "README.md", ROOT / "docs/tutorial-digits.md", ROOT / "docs/tutorial-own-images.md",
    *sorted({*(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"}),
]  # fmt: skip
"""In the order in which their commands run; a page twice in it counts once."""
PROGRAMS = ("python", "deepspeed", "make", ".venv/bin/python", "bash")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    what: str
    """`run`, `check` or `shown`."""
    text: str


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {shlex.join(self.words)}"


def blocks() -> Iterator[Block]:
    for page in dict.fromkeys(PAGES):
        text = page.read_text()
        for match in re.finditer(r"^(`{3,})([^\n`]*)\n(.*?)^\1[ ]*$", text, flags=re.M | re.S):
            language, _, what = match[2].strip().partition(" ")
            if language.startswith("{"):  # a directive of the site
                continue
            line = text[: match.start()].count("\n") + 2
            yield Block(page.relative_to(ROOT).as_posix(), line, language, what or "check", match[3])


def commands(block: Block) -> Iterator[Command]:
    """Commands of this project's programs; lines that end in a backslash go on."""
    if block.language not in ("bash", ""):
        return
    line, text = block.line, ""
    for number, part in enumerate(block.text.splitlines()):
        text += part.removesuffix("\\") + " "
        if part.endswith("\\"):
            continue
        if text.startswith(tuple(f"{program} " for program in PROGRAMS)):
            yield Command(block.page, line, tuple(shlex.split(text, comments=True)))
        text, line = "", block.line + number + 1


def commands_to(what: str) -> list[Command]:
    """All different commands that a test runs, or checks, each where it is first."""
    found: dict[tuple[str, ...], Command] = {}
    for block in blocks():
        if block.what == what:
            for command in commands(block):
                found.setdefault(command.words, command)
    return list(found.values())


def script_and_options(command: Command) -> tuple[list[str], str, list[str]]:
    """The launcher's options, the script and its options."""
    words = list(command.words[1:])
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    return words[:place], words[place], words[place + 1 :]
