"""Spaces that come with the package, a file each; `--space` reads files of the same form."""

from pathlib import Path

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Space
from bsnas.engine.space.space_file import read_space

_DIRECTORY = Path(__file__).parent


def space_names() -> list[str]:
    return sorted(file.stem for file in _DIRECTORY.glob("*.toml"))


def space_at(place: str) -> Space:
    """The space of a TOML file, or the package's of that name. Raises `UserError` when there is neither."""
    return space_named(place) if place in space_names() and not Path(place).exists() else read_space(place)


def space_named(name: str) -> Space:
    """The space of that name. Raises `UserError` for an unknown one."""
    if name not in space_names():
        raise UserError(f"space {name!r:.40} is unknown; allowed are {', '.join(space_names())}")
    return read_space(_DIRECTORY / f"{name}.toml")
