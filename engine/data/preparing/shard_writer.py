"""WebDataset shards of a prepared data set, each with the index file of DALI's reader, in a fixed random order.

For network file systems, where a million small files cost more than their bytes. A shard is an ordinary tar file: three
members per sample, NUMBER.jpg, NUMBER.cls (the label) and NUMBER.json (class and name).
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from bsnas.engine.data.contents import read_image
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.split import hash_rank
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.console import Progress

BLOCK = 512
DALI_INDEX_VERSION = "v1.2"


def write_shards(
    output: Path, part: str, files: FileList, classes: Sequence[str], shard_bytes: int, threads: int
) -> FileList:
    """The same images, their places now in shards of about `shard_bytes`. Shards that are there already are kept."""
    order = sorted(range(len(files)), key=lambda place: hash_rank(0, files.names[place]))
    plan = hashlib.sha256(f"{files.identity} {shard_bytes} {list(classes)}".encode()).hexdigest()[:8]
    groups = _groups(files, order, shard_bytes)
    names = [f"shards/{part}-{plan}-{number:06}.tar" for number in range(len(groups))]
    offsets = np.empty(len(files), np.int64)
    places = [""] * len(files)
    with (
        ThreadPoolExecutor(threads) as pool,
        Progress(f"writing shards of {part}", len(groups), unit="shards") as progress,
    ):
        jobs = [
            pool.submit(_write_shard, output / name, files, group, classes)
            for name, group in zip(names, groups, strict=True)
        ]
        for name, group, job in zip(names, groups, jobs, strict=True):
            for place, offset in zip(group, job.result(), strict=True):
                places[place], offsets[place] = name, offset
            progress.advance()
    return replace(files, root=output, files=tuple(places), offsets=offsets)


def _groups(files: FileList, order: Sequence[int], shard_bytes: int) -> list[list[int]]:
    groups: list[list[int]] = []
    room = 0
    for place in order:
        size = int(files.sizes[place])
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(place)
        room -= size
    return groups


def _write_shard(target: Path, files: FileList, group: Sequence[int], classes: Sequence[str]) -> list[int]:
    """Write a shard and its index; returns the offset of each image."""
    members = [_members(files, number, place, classes) for number, place in enumerate(group)]
    images, end = _offsets(members, files.sizes[list(group)].tolist())
    if not (target.is_file() and target.stat().st_size == end and target.with_suffix(".idx").is_file()):
        write_atomically(target, _tar(members, files, group), durable=False)
        sizes = files.sizes[list(group)].tolist()
        write_atomically(target.with_suffix(".idx"), _dali_index(members, sizes), durable=False)
    return images


Member = tuple[str, bytes | None]
"""Name and content; None for the image."""


def _members(files: FileList, number: int, place: int, classes: Sequence[str]) -> list[Member]:
    label = int(files.labels[place])
    suffix = os.path.splitext(files.files[place] if files.offsets is None else files.names[place])[1].lower() or ".jpg"
    record = json.dumps({"class": classes[label], "label": label, "name": files.names[place]})
    key = f"{number:08}"
    return [(f"{key}{suffix}", None), (f"{key}.cls", str(label).encode()), (f"{key}.json", record.encode())]


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _offsets(members: Sequence[list[Member]], sizes: Sequence[int]) -> tuple[list[int], int]:
    """First byte of each image, and the size of the tar file."""
    images, place = [], 0
    for group, size in zip(members, sizes, strict=True):
        for _, content in group:
            if content is None:
                images.append(place + BLOCK)
            place += BLOCK + _padded(size if content is None else len(content))
    return images, -(-(place + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def _tar(members: Sequence[list[Member]], files: FileList, group: Sequence[int]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample, place in zip(members, group, strict=True):
            for name, content in sample:
                held = read_image(files, place) if content is None else content
                info = tarfile.TarInfo(name)
                info.size = len(held)
                tar.addfile(info, io.BytesIO(held))
    return buffer.getvalue()


def _dali_index(members: Sequence[list[Member]], sizes: Sequence[int]) -> bytes:
    """A line per sample: extension, offset, size and name of each member (wds2idx, version 1.2)."""
    lines, place = [f"{DALI_INDEX_VERSION} {len(members)}"], 0
    for group, image_size in zip(members, sizes, strict=True):
        fields = []
        for name, content in group:
            size = image_size if content is None else len(content)
            fields.append(f"{name.partition('.')[2]} {place + BLOCK} {size} {name}")
            place += BLOCK + _padded(size)
        lines.append(" ".join(fields))
    return ("\n".join(lines) + "\n").encode()
