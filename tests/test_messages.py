"""Every error message of the code is read by a test.

Messages are collected from the source: the text of each `UserError(...)` and its relatives. A message counts as read
when a string of some test holds twelve characters in a row of it that no other message has. Such a string stands in
`pytest.raises(match=...)` or in an assertion, which fail when the message is not raised, so this needs no run of the
other tests and sees those that start processes too.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = ("engine", "kernels", "search", "benchmarks")
ERRORS = {"UserError", "MachineError", "Preempted", "CannotRun", "ValueError", "RuntimeError"}
LENGTH = 12
"""Characters in a row that tell a message from another."""


def messages(source: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(line, constant parts of the text) of every error that is made."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in ERRORS and (parts := tuple(part for argument in node.args for part in texts(argument))):
                yield node.lineno, parts


def texts(node: ast.AST) -> list[str]:
    """The constant parts of the strings in an expression, those of f-strings apart at each value."""
    if isinstance(node, ast.JoinedStr):
        return [part.value for part in node.values if isinstance(part, ast.Constant)]
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    return [text for child in ast.iter_child_nodes(node) for text in texts(child)]


def grams(text: str) -> set[str]:
    """All runs of LENGTH characters; all of a shorter text."""
    return {text[i : i + LENGTH] for i in range(max(1, len(text) - LENGTH + 1))}


def read_by_tests(source: str) -> set[str]:
    """All runs of characters in the strings of a test file, docstrings left out; escapes of patterns are undone."""
    tree = ast.parse(source)
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, described)}
    found: set[str] = set()
    for text in texts(tree):
        if text not in docstrings and len(text) >= LENGTH:
            found |= grams(text.replace("\\", ""))
    return found


def unread(sources: dict[str, str], tests: list[str]) -> list[str]:
    """`FILE:LINE text` of every message whose own words stand in no test."""
    sites = [(file, line, parts) for file, source in sources.items() for line, parts in messages(source)]
    owners: defaultdict[str, set[tuple[str, ...]]] = defaultdict(set)
    for _, _, parts in sites:
        for part in parts:
            for gram in grams(part):
                owners[gram].add(parts)  # the same text in two places is one message
    read: set[str] = set().union(*map(read_by_tests, tests))
    missing = []
    for file, line, parts in sites:
        every = {gram for part in parts for gram in grams(part) if len(gram) == LENGTH}
        own = {gram for gram in every if len(owners[gram]) == 1}
        if every and not (own or every) & read:  # what only wraps another message has no words of its own
            missing.append(f"{file}:{line} {'{}'.join(parts)}")
    return missing


def test_every_message_is_read_by_a_test() -> None:
    sources = {
        str(file.relative_to(ROOT)): file.read_text() for package in PACKAGES for file in (ROOT / package).rglob("*.py")
    }
    tests = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py") if file != Path(__file__)]
    missing = unread(sources, tests)
    assert not missing, f"{len(missing)} messages that no test reads:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    ("test", "count"),
    [
        (r'raises(match=r"the first thing is \(.*\), not allowed")', 1),  # the other message is read by none
        ('assert "is wrong with the second" in said\nassert "the first thing is" in said', 0),
        ('assert "the first" in said', 2),
        ('def f():\n    """the first thing is, is wrong with the second"""', 2),
    ],
)
def test_a_message_that_no_test_reads_is_found(test: str, count: int) -> None:
    source = """
raise UserError(f"the first thing is ({n}), not allowed")
raise MachineError(f"{n} is wrong with the second")
"""
    assert len(unread({"a.py": source}, [test])) == count
