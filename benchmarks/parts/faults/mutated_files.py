"""Files that were changed by accident or on purpose, and what reading them must come to.

A mutation changes bytes (flipped, cut out, put in, cut off) or values of the JSON data (another type, another size,
left out, unknown). Reading must refuse it in one line, or have read exactly what the file says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from bsnas.engine.checkpoints.manifest import Manifest, read_manifest
from bsnas.engine.config import RunConfig, from_json, to_json
from bsnas.engine.host.errors import UserError
from bsnas.engine.retrain import named_arch
from bsnas.engine.runs.rundir import read_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.space import Space

SETTINGS = settings(database=None, deadline=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "0", "../../etc/passwd",
    "\x00", "k3t3c16", "c16:k3t3", [], {}, [[]], [0], {"format": 1}, "9" * 5000,
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three mutations of a JSON file's bytes or data."""
    for _ in range(draw(st.integers(1, 3))):
        mutate = _data if draw(st.booleans()) else _bytes
        content = mutate(draw, content)
    return content


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    kind = draw(st.sampled_from(("flip", "cut out", "put in", "cut off")))
    if kind == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    if kind == "cut out":
        return content[:place] + content[place + draw(st.integers(1, 20)) :]
    if kind == "put in":
        return content[:place] + draw(st.binary(min_size=1, max_size=8) | st.sampled_from((b"[" * 2000, b"9" * 40)))
    return content[:place]


def _data(draw: st.DrawFn, content: bytes) -> bytes:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError):
        return content
    places = list(_places(data))
    if not places:
        return json.dumps(draw(st.sampled_from(ODD_VALUES))).encode()
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(("replace", "replace", "drop", "unknown", "near")))
    if kind == "drop":
        del holder[key]
    elif kind == "unknown" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8))] = draw(st.sampled_from(ODD_VALUES))
    elif kind == "near" and type(holder[key]) is int:
        holder[key] += draw(st.sampled_from((-2, -1, 1, 2)))
    else:
        holder[key] = draw(st.sampled_from(ODD_VALUES))
    return json.dumps(data).encode()


def _places(data: Any) -> Any:
    """Every (container, key) in JSON data."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield data, key
        yield from _places(value)


# ---- what reading must come to


@dataclass(frozen=True)
class Reader:
    """A kind of file: an example, and a function that reads one and gives back the data that it took from it."""

    content: bytes
    name: str
    read: Callable[[Path], Any]


def config_reader(config: RunConfig) -> Reader:
    return Reader(
        json.dumps(to_json(config)).encode(),
        "config.json",
        lambda file: to_json(from_json(RunConfig, read_json(file), file)),
    )


def manifest_reader(file: Path) -> Reader:
    """Of a checkpoint's manifest, which has a checksum of its own."""

    def read(copy: Path) -> Any:
        return {**to_json(read_manifest(copy.with_suffix(".pt"))), "check": read_json(copy)["check"]}

    return Reader(file.read_bytes(), file.name, read)


def manifest_fields_reader(file: Path) -> Reader:
    """Of a manifest whose checksum whoever changed it has set right."""
    fields = {name: value for name, value in json.loads(file.read_bytes()).items() if name != "check"}
    return Reader(
        json.dumps(fields).encode(), file.name, lambda copy: to_json(from_json(Manifest, read_json(copy), copy))
    )


def space_reader(space: Space) -> Reader:
    return Reader(
        json.dumps(space.to_json()).encode(), "step-1.json", lambda f: Space.from_json(read_json(f)).to_json()
    )


def arch_reader(space: Space, arch: Arch) -> Reader:
    """A search's best.json."""

    def read(file: Path) -> Any:
        text = named_arch(file)
        space.check(Arch.parse(text))
        return {**read_json(file), "arch": str(Arch.parse(text))}

    return Reader(json.dumps({"arch": str(arch)}).encode(), "best.json", read)


def wrong_answer(reader: Reader, directory: Path, content: bytes) -> tuple[str, str | None]:
    """("refused" or "accepted", what was wrong about that or None) of one mutated file."""
    file = directory / reader.name
    file.write_bytes(content)
    try:
        taken = reader.read(file)
    except UserError as error:
        line = str(error)
        return "refused", None if "\n" not in line and 10 < len(line) < 2000 else f"the message {line[:200]!r}"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {str(error)[:200]}"
    said = json.loads(content)
    return "accepted", None if _equal(said, taken) else "something else was read than the file says"


def _equal(said: Any, taken: Any) -> bool:
    """Equal JSON data, numbers by value; what the file leaves out has taken its default."""
    if isinstance(said, dict) and isinstance(taken, dict):
        return said.keys() <= taken.keys() and all(_equal(value, taken[key]) for key, value in said.items())
    if isinstance(said, list) and isinstance(taken, list):
        return len(said) == len(taken) and all(map(_equal, said, taken))
    if isinstance(said, str) and isinstance(taken, str):
        return re.sub(r"\s|(?<=[ktc])0+(?=\d)", "", said) == re.sub(r"\s|(?<=[ktc])0+(?=\d)", "", taken)
    if isinstance(said, float) and isinstance(taken, float) and said != said:
        return taken != taken  # no number, as JSON of Python may say
    return (type(said) is type(taken) and said == taken) or (
        {type(said), type(taken)} == {int, float} and said == taken
    )


def try_mutations(
    readers: dict[str, Reader], directory: Path, examples: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """Counts by `KIND refused` and `KIND accepted` over `examples` mutations of each, and everything that was wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for kind, reader in readers.items():
        _try(kind, reader, directory, settings(SETTINGS, max_examples=examples), seed, counts, wrong)
    return counts, wrong


def _try(
    kind: str, reader: Reader, directory: Path, how: settings, seed: int, counts: Counter[str], wrong: list[str]
) -> None:
    @seeded(seed)
    @how
    @given(content=mutated(reader.content))
    def check(content: bytes) -> None:
        if content != reader.content:
            answer, problem = wrong_answer(reader, directory, content)
            counts[f"{kind} {answer}"] += 1
            if problem:
                wrong.append(f"{kind}: {problem}: {content[:300]!r}")

    check()
