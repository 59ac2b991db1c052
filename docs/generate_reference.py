"""Write docs/options.md, every option of every script, from the scripts' own dataclasses.

python docs/generate_reference.py

A test compares the page with what this writes, and its options with each script's --help.
"""

import ast
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]

import tyro

from bsnas.engine.host.console import ConsoleOptions
from bsnas.engine.presets import PRESETS

PAGE = ROOT / "docs/options.md"
SCRIPTS = (
    "engine/prepare.py", "search/space.py", "engine/train.py", "search/evolve.py", "search/finals.py",
    "engine/retrain.py", "engine/export.py", "search/latency.py",
    "benchmarks/latency.py", "benchmarks/serve_check.py", "search/report.py", "engine/status.py", "benchmarks/demo.py",
    "benchmarks/ranking.py", "benchmarks/study.py", "benchmarks/early_decisions.py", "benchmarks/soak.py",
    "benchmarks/evaluation.py", "benchmarks/loader.py", "benchmarks/loader_augmentations.py",
    "benchmarks/miniatures.py", "benchmarks/throughput.py", "benchmarks/search_quality.py",
    "benchmarks/tabular.py", "benchmarks/same_results.py",
)  # fmt: skip
"""In the order of a search. Scripts that parse their line themselves are told by their --help alone."""
HEAD = """# Every option

Written from the code by `docs/generate_reference.py`. An option that is not given takes the default shown; those of
`engine/train.py` come from the preset. Every script says the same with `--help`, and takes `--quiet` and `--verbose`.
"""


class Stop(Exception):
    """Ends a script's `main` once it has told what it parses."""


@dataclass(frozen=True)
class Option:
    """One option as it is written on the command line."""

    name: str
    values: str
    help: str
    default: Any

    @property
    def default_text(self) -> str:
        """The default in a cell; a switch that is on says how it is turned off."""
        if self.default is MISSING:
            return "needed"
        if self.default is None or self.default is False or self.default == ():
            return ""
        if self.default is True:
            path, dot, last = self.name[2:].rpartition(".")
            return f"on; off with `--{path}{dot}no-{last}`"
        if isinstance(self.default, tuple):
            return " ".join(f"`{part}`" for part in self.default)
        return f"`{self.default}`"


def arguments_of(script: str) -> tuple[type, str, Any]:
    """What a script parses: its dataclass, its docstring, and the instance that holds its defaults."""
    module: Any = importlib.import_module("bsnas." + script.removesuffix(".py").replace("/", "."))
    told: list[Any] = []

    def tell(kind: type, description: str | None, argv: list[str], default: Any = None) -> None:
        told.extend((kind, description, default))
        raise Stop

    parse, argv = module.parse, sys.argv
    module.parse, sys.argv = tell, [script]
    try:
        module.main()
    except Stop:
        return told[0], inspect.cleandoc(told[1]), told[2]
    finally:
        module.parse, sys.argv = parse, argv
    raise AssertionError(f"{script} parses no arguments")


def options(kind: type, default: Any = None, prefix: str = "") -> Iterator[Option]:
    """The options of a dataclass and of those inside it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = field_docstrings(kind)
    for field in fields(kind):
        hint, marks = hints[field.name], []
        if get_origin(hint) is typing.Annotated:
            hint, *marks = get_args(hint)
        if tyro.conf.Suppress in marks:
            continue
        value = default_of(field) if default is None else getattr(default, field.name)
        unprefixed = any(getattr(mark, "name", None) == "" for mark in marks)
        if isinstance(hint, type) and is_dataclass(hint):
            yield from options(hint, value, prefix if unprefixed else f"{prefix}{field.name.replace('_', '-')}.")
        else:
            named = f"--{prefix}{field.name.replace('_', '-')}"
            name = field.name.upper() if tyro.conf.Positional in marks else named
            yield Option(name, values_of(hint), texts.get(field.name, ""), value)


def default_of(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def field_docstrings(kind: type) -> dict[str, str]:
    """The string under each field, of the class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed([c for c in kind.__mro__ if is_dataclass(c)]):
        body = ast.parse(inspect.cleandoc(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    texts[line.target.id] = " ".join(text.value.split())
    return texts


def values_of(hint: Any) -> str:
    """What may be written after an option."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return values_of(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(values_of(part) for part in inner if part is not type(None))
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"{values_of(inner[0])} ..."
        return " ".join(values_of(part) for part in inner)
    if hint is bool:
        return ""
    return {int: "integer", float: "number", str: "text", Path: "path"}[hint]


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


def section(script: str) -> str:
    kind, description, default = arguments_of(script)
    summary, _, rest = description.partition("\n\n")
    examples = [line.strip() for line in rest.splitlines() if line.strip().startswith(("python ", "deepspeed "))]
    parts = [f"## {script}", " ".join(summary.split())]
    if examples:
        parts.append("```text\n" + "\n".join(examples) + "\n```")
    if script == "engine/train.py":
        parts.append(train_table(kind))
    else:
        rows = [[f"`{o.name}`", o.values, o.help, o.default_text] for o in options(kind, default)]
        parts.append(table(["option", "values", "meaning", "default"], rows))
    return "\n\n".join(parts)


def train_table(kind: type) -> str:
    """Defaults of every preset side by side."""
    presets = [list(options(kind, kind(config=make()))) for make in PRESETS.values()]
    rows = []
    for same in zip(*presets, strict=True):
        defaults = [option.default_text for option in same]
        rows.append([f"`{same[0].name}`", same[0].values, same[0].help, *defaults])
    return table(["option", "values", "meaning", *PRESETS], rows)


def page() -> str:
    console = [[f"`{o.name}`", o.help] for o in options(ConsoleOptions)]
    parts = [HEAD.rstrip(), table(["option of every script", "meaning"], console), *map(section, SCRIPTS)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
