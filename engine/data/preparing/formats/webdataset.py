"""WebDataset shards: tar files whose members with one name before the first dot are one sample."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bsnas.engine.data.file_list import IMAGE_SUFFIXES
from bsnas.engine.data.preparing.formats.archives import range_reader, regular_members, stamp_of_archive
from bsnas.engine.data.preparing.formats.sample import (
    ClassNames,
    Problem,
    Sample,
    UniqueNames,
    files_and_parts,
    sample_name,
)
from bsnas.engine.host.errors import UserError

MAX_LABEL_BYTES = 2**20
LABEL_KEYS = ("class", "class_name", "label", "cls")


@dataclass
class _Group:
    """The members of a sample so far."""

    key: str
    image: str = ""
    offset: int = 0
    size: int = 0
    label: object = None
    """From .cls or .json."""
    name: str | None = None
    """The image's own name, where .json has one."""
    problems: list[Problem] = field(default_factory=list)


class WebDatasetReader:
    """Shards of a directory, in the order of their names; the label is in .cls or .json, or is the key's directory."""

    def __init__(self, directory: Path, classes: tuple[str, ...] | None) -> None:
        """Raises UserError for a directory without shards."""
        self._directory, self._classes = directory, ClassNames(classes)
        shards = list(directory.rglob("*.tar"))
        if not shards:
            raise UserError(f"{directory} holds no .tar shards; give the directory of WebDataset's shards")
        self._shards = files_and_parts(directory, shards)
        self.total_bytes = sum(path.stat().st_size for path, _ in self._shards)

    def samples(self) -> Iterator[Sample | Problem]:
        unique = UniqueNames()
        for shard, part in self._shards:
            for group in _groups(shard):
                yield from group.problems
                found = self._sample(shard, part, group, unique)
                if found is not None:
                    yield found

    def _sample(self, shard: Path, part: str, group: _Group, unique: UniqueNames) -> Sample | Problem | None:
        where = f"{shard.name}/{group.key}"
        if not group.image:
            return None if group.problems else Problem(where, "has no image")
        directory = PurePosixPath(group.key).parent.name
        label = group.label if group.label is not None else directory or None
        if label is None:
            return Problem(where, "has no label: neither .cls nor .json nor a directory")
        try:
            class_name = self._classes.of(label)
        except KeyError as error:
            return Problem(where, str(error.args[0]))
        return Sample(
            part=part,
            name=unique.of(part, sample_name(group.name or group.image, class_name)),
            load=range_reader(shard, group.offset, group.size),
            stamp=stamp_of_archive(shard, group.size),
        )


def _groups(shard: Path) -> Iterator[_Group]:
    """Consecutive members with the same key."""
    group: _Group | None = None
    for member, fault in regular_members(shard):
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else str(path)
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key)
        _take(group, shard, member.name, extension.lower(), member.offset_data, member.size, fault)
    if group is not None:
        yield group


def _take(group: _Group, shard: Path, name: str, extension: str, offset: int, size: int, fault: str | None) -> None:
    """Add one member to its sample."""
    where = f"{shard.name}/{name}"
    last = "." + extension.rpartition(".")[2]
    if fault:
        group.problems.append(Problem(where, fault))
    elif last in IMAGE_SUFFIXES and not group.image:
        group.image, group.offset, group.size = name, offset, size
    elif extension in ("cls", "json"):
        try:
            content = range_reader(shard, offset, min(size, MAX_LABEL_BYTES))()
            _take_label(group, extension, content)
        except (OSError, ValueError, RecursionError):
            group.problems.append(Problem(where, "is no label that can be read"))


def _take_label(group: _Group, extension: str, content: bytes) -> None:
    if extension == "cls":
        group.label = content.decode().strip()
        return
    record = json.loads(content)
    if isinstance(record, dict):
        key = next((key for key in LABEL_KEYS if isinstance(record.get(key), (str, int))), None)
        if key is not None and (group.label is None or key in ("class", "class_name")):
            group.label = record[key]
        if isinstance(record.get("name"), str):
            group.name = record["name"]
