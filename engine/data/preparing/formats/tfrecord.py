"""TFRecord files of tf.train.Example, read without TensorFlow: the framing and the few fields of the message."""

import re
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bsnas.engine.data.contents import MAX_FILE_BYTES
from bsnas.engine.data.preparing.formats.archives import range_reader, stamp_of_archive
from bsnas.engine.data.preparing.formats.sample import (
    ClassNames,
    Item,
    Problem,
    Sample,
    files_and_parts,
    sample_name,
)
from bsnas.engine.host.errors import UserError

IMAGE_KEYS = ("image/encoded", "image", "image_raw", "encoded")
NAME_KEYS = ("image/filename", "file_name", "filename")
LABEL_KEYS = ("image/class/synset", "image/class/text", "image/class/label", "label")
SHARD = re.compile(r".*(\.tfrecords?|-\d{5}-of-\d{5})$")

Features = dict[str, bytes | int]


def is_tfrecord(path: Path) -> bool:
    """Whether a file is named as TFRecord files are."""
    return bool(SHARD.fullmatch(path.name)) and path.is_file()


class TFRecordReader:
    """Files of a directory, in the order of their names. Checksums are not verified: each image is decoded anyway."""

    def __init__(self, directory: Path, classes: tuple[str, ...] | None) -> None:
        """Raises UserError for a directory without TFRecord files."""
        self._classes = ClassNames(classes)
        files = [path for path in directory.rglob("*") if is_tfrecord(path)]
        if not files:
            raise UserError(f"{directory} holds no TFRecord files (*.tfrecord, *-00000-of-00010); give their directory")
        self._files, self._left_out = files_and_parts(directory, files)
        self.total_bytes = sum(path.stat().st_size for path, _ in self._files)

    def samples(self) -> Iterator[Item]:
        yield from self._left_out
        for file, part in self._files:
            for number, (offset, size) in enumerate(_records(file)):
                yield self._sample(file, part, number, offset, size)

    def _sample(self, file: Path, part: str, number: int, offset: int, size: int) -> Sample | Problem:
        where = f"{file.name}:{number}"
        try:
            features = parse_example(range_reader(file, offset, size)())
        except (OSError, ValueError, IndexError) as error:
            return Problem(where, f"is no tf.train.Example ({error})")
        image = next((features[key] for key in IMAGE_KEYS if isinstance(features.get(key), bytes)), None)
        label = next((features[key] for key in LABEL_KEYS if features.get(key) not in (None, b"")), None)
        if not isinstance(image, bytes) or label is None:
            return Problem(where, f"has no image or no label among its fields {', '.join(sorted(features))[:100]}")
        try:
            class_name = self._classes.of(label)
        except KeyError as error:
            return Problem(where, str(error.args[0]))
        given = next((features[key] for key in NAME_KEYS if isinstance(features.get(key), bytes)), b"")
        name = given.decode("utf-8", "replace") if isinstance(given, bytes) and given else f"{file.name}-{number:07}"
        return Sample(
            part=part,
            name=sample_name(name, class_name),
            load=partial(bytes, image),
            stamp=stamp_of_archive(file, len(image)),
        )


def _records(file: Path) -> Iterator[tuple[int, int]]:
    """Offset and size of each record's data: 8 bytes of length, 4 of checksum, the data, 4 of checksum."""
    total, place = file.stat().st_size, 0
    with open(file, "rb") as handle:
        while place < total:
            handle.seek(place)
            head = handle.read(12)
            size = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else total
            if place + 16 + size > total or size > MAX_FILE_BYTES:
                raise UserError(f"{file} is no TFRecord file or is cut off at byte {place}; bring it back")
            yield place + 12, size
            place += 16 + size


def parse_example(content: bytes) -> Features:
    """The first value of each feature of a tf.train.Example. Raises ValueError or IndexError for other content.

    Example{1: Features}; Features{1: entries of a map}; an entry {1: key, 2: Feature}; Feature{1: bytes, 2: floats,
    3: integers}, each a list in its field 1. Floats are left out.
    """
    features: Features = {}
    for _, body in _fields(content, 1):
        for _, entry in _fields(body, 1):
            key = next((value.decode() for _, value in _fields(entry, 1)), None)
            for _, feature in _fields(entry, 2):
                for kind, values in _fields(feature, None):
                    value = _first(kind, values)
                    if key is not None and value is not None:
                        features[key] = value
    return features


def _first(kind: int, values: bytes) -> bytes | int | None:
    if kind == 1:
        return next((value for _, value in _fields(values, 1)), None)
    if kind == 3 and values:
        place = 1 if values[0] == 0x08 else _varint(values, 1)[1]  # a single integer, or a packed list
        return _varint(values, place)[0] if place < len(values) else None
    return None


def _fields(content: bytes, wanted: int | None) -> Iterator[tuple[int, bytes]]:
    """Fields of a message that are byte strings or messages; others are stepped over."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, place = _varint(content, place)
            if place + size > len(content):
                raise ValueError("a field is longer than its message")
            if wanted is None or number == wanted:
                yield number, content[place : place + size]
            place += size
        elif wire == 0:
            _, place = _varint(content, place)
        elif wire in (1, 5):
            place += 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field has the unknown type {wire}")


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value - (1 << 64 if value >> 63 else 0), place
        if shift > 63:
            raise ValueError("a number is too long")
