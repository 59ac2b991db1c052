"""A Hugging Face image data set in local Parquet files: a column of encoded images and one of labels."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bsnas.engine.data.preparing.formats.archives import stamp_of_archive
from bsnas.engine.data.preparing.formats.sample import (
    ClassNames,
    Item,
    Problem,
    Sample,
    files_and_parts,
    sample_name,
)
from bsnas.engine.host.errors import UserError, first_line

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "fine_label", "target")
ROWS = 64


class ParquetReader:
    """Files of a directory, in the order of their names. Class names come from Hugging Face's description."""

    def __init__(self, directory: Path, classes: tuple[str, ...] | None) -> None:
        """Raises UserError for a directory without Parquet files."""
        self._given = classes
        self._classes: dict[tuple[str, ...] | None, ClassNames] = {}
        """By the names of a file's description."""
        files = list(directory.rglob("*.parquet"))
        if not files:
            raise UserError(f"{directory} holds no .parquet files; give the directory of the data set's files")
        self._files, self._left_out = files_and_parts(directory, files)
        self.total_bytes = sum(path.stat().st_size for path, _ in self._files)

    def samples(self) -> Iterator[Item]:
        yield from self._left_out
        for file, part in self._files:
            yield from self._file(file, part)

    def _file(self, file: Path, part: str) -> Iterator[Sample | Problem]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(file) as opened:
                image, label, names = _columns(file, opened.schema_arrow)
                names = self._given or names
                classes = self._classes.setdefault(names, ClassNames(names))
                number = 0
                for batch in opened.iter_batches(ROWS, columns=[image, label]):
                    for row in batch.to_pylist():
                        yield _sample(file, part, number, row[image], row[label], classes)
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file} cannot be read as Parquet: {first_line(error)}; bring it back") from None


def _sample(file: Path, part: str, number: int, image: Any, label: Any, classes: ClassNames) -> Sample | Problem:
    where = f"{file.name}:{number}"
    content = image.get("bytes") if isinstance(image, dict) else image
    path = (image.get("path") if isinstance(image, dict) else None) or f"{file.stem}-{number:07}"
    if not isinstance(content, bytes):
        return Problem(where, "holds no image bytes")
    try:
        class_name = classes.of(label)
    except KeyError as error:
        return Problem(where, str(error.args[0]))
    return Sample(
        part=part,
        name=sample_name(path, class_name),
        load=partial(bytes, content),
        stamp=stamp_of_archive(file, len(content)),
    )


def _columns(file: Path, schema: Any) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image and label columns, and the class names where the schema has them."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    kinds = {name: value.get("_type") for name, value in features.items() if isinstance(value, dict)}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    image = next((name for name in (*images, *IMAGE_COLUMNS) if name in schema.names), None)
    label = next((name for name in (*labels, *LABEL_COLUMNS) if name in schema.names), None)
    if image is None or label is None:
        raise UserError(
            f"{file} has the columns {', '.join(schema.names)[:100]}; it needs one of images "
            f"({', '.join(IMAGE_COLUMNS)}) and one of labels ({', '.join(LABEL_COLUMNS)})"
        )
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    return image, label, tuple(map(str, names)) if names else None
