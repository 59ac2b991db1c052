"""WebDataset shards: tar files whose members with one name before the first dot are one sample."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from bsnas.engine.data.file_list import HIDDEN, IMAGE_SUFFIXES, is_hidden, rule_of, unread_image
from bsnas.engine.data.preparing.formats.archives import range_reader, regular_members, stamp_of_archive
from bsnas.engine.data.preparing.formats.sample import (
    ClassNames,
    Item,
    LeftOut,
    Problem,
    Sample,
    files_and_parts,
    sample_name,
)
from bsnas.engine.host.errors import UserError

MAX_LABEL_BYTES = 2**20
T = TypeVar("T")
LABEL_KEYS = ("class", "class_name", "label", "cls")


@dataclass
class _Group:
    """The members of a sample so far. One that holds several images, as views, is as many samples with its label."""

    key: str
    images: list[tuple[str, int, int]] = field(default_factory=list)
    """Name, first byte and size of each."""
    labels: dict[str, object] = field(default_factory=dict)
    """From .cls or .json, by the name of the member without its last suffix."""
    names: dict[str, str] = field(default_factory=dict)
    """An image's own name, where .json has one, likewise."""
    problems: list[Problem] = field(default_factory=list)

    def about(self, image: str, known: Mapping[str, T]) -> T | None:
        """What a label file says of an image: the one with the image's own name, else the group's only one."""
        own = PurePosixPath(image).stem
        return known[own] if own in known else known.get(PurePosixPath(self.key).name)


class WebDatasetReader:
    """Shards of a directory, in the order of their names; the label is in .cls or .json, or is the key's directory."""

    def __init__(self, directory: Path, classes: tuple[str, ...] | None) -> None:
        """Raises UserError for a directory without shards."""
        self._directory, self._classes = directory, ClassNames(classes)
        shards = list(directory.rglob("*.tar"))
        if not shards:
            raise UserError(f"{directory} holds no .tar shards; give the directory of WebDataset's shards")
        self._shards, self._left_out = files_and_parts(directory, shards)
        self.total_bytes = sum(path.stat().st_size for path, _ in self._shards)

    def samples(self) -> Iterator[Item]:
        yield from self._left_out
        for shard, part in self._shards:
            for group in _groups(shard):
                if isinstance(group, LeftOut):
                    yield group
                    continue
                yield from group.problems
                if not group.images and not group.problems:
                    yield Problem(f"{shard.name}/{group.key}", "has no image")
                for image, offset, size in group.images:
                    yield self._sample(shard, part, group, image, offset, size)

    def _sample(self, shard: Path, part: str, group: _Group, image: str, offset: int, size: int) -> Sample | Problem:
        where = f"{shard.name}/{image if len(group.images) > 1 else group.key}"
        directory = PurePosixPath(group.key).parent.name
        label = group.about(image, group.labels)
        label = label if label is not None else directory or None
        if label is None:
            return Problem(where, "has no label: neither .cls nor .json nor a directory")
        try:
            class_name = self._classes.of(label)
        except KeyError as error:
            return Problem(where, str(error.args[0]))
        return Sample(
            part=part,
            name=sample_name(group.about(image, group.names) or image, class_name),
            load=range_reader(shard, offset, size),
            stamp=stamp_of_archive(shard, size),
        )


def _groups(shard: Path) -> Iterator[_Group | LeftOut]:
    """Consecutive members with the same key, which is the name before its first dot."""
    group: _Group | None = None
    for member, fault in regular_members(shard):
        if is_hidden(member.name):
            yield LeftOut(HIDDEN)
            continue
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.partition(".")
        key = str(path.with_name(stem)) if stem else str(path)
        if group is None or key != group.key:
            if group is not None:
                yield group
            group = _Group(key)
        if not _take(group, shard, member.name, extension.lower(), member.offset_data, member.size, fault):
            yield LeftOut(rule_of(PurePosixPath(member.name).suffix.lower()))
    if group is not None:
        yield group


def _take(group: _Group, shard: Path, name: str, extension: str, offset: int, size: int, fault: str | None) -> bool:
    """Add one member to its sample. Whether it is any part of one."""
    where = f"{shard.name}/{name}"
    last = "." + extension.rpartition(".")[2]
    if fault:
        group.problems.append(Problem(where, fault))
    elif last in IMAGE_SUFFIXES:
        group.images.append((name, offset, size))
    elif reason := unread_image(last):
        group.problems.append(Problem(where, reason))
    elif last in (".cls", ".json"):
        try:
            content = range_reader(shard, offset, min(size, MAX_LABEL_BYTES))()
            _take_label(group, last, PurePosixPath(name).stem, content)
        except (OSError, ValueError, RecursionError):
            group.problems.append(Problem(where, "is no label that can be read"))
    else:
        return False
    return True


def _take_label(group: _Group, kind: str, stem: str, content: bytes) -> None:
    """`stem` is the name of the label file without its suffix."""
    if kind == ".cls":
        group.labels[stem] = content.decode().strip()
        return
    record = json.loads(content)
    if isinstance(record, dict):
        key = next((key for key in LABEL_KEYS if isinstance(record.get(key), (str, int))), None)
        if key is not None and (stem not in group.labels or key in ("class", "class_name")):
            group.labels[stem] = record[key]
        if isinstance(record.get("name"), str):
            group.names[stem] = record["name"]
