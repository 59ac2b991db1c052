"""Which reader a source needs."""

from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from bsnas.engine.data.file_list import is_hidden
from bsnas.engine.data.preparing.formats.csv_list import CsvReader
from bsnas.engine.data.preparing.formats.image_folder import ImageFolderReader
from bsnas.engine.data.preparing.formats.imagenet import TRAIN, ImageNetReader
from bsnas.engine.data.preparing.formats.parquet import ParquetReader
from bsnas.engine.data.preparing.formats.sample import Reader, read_class_names
from bsnas.engine.data.preparing.formats.tfrecord import TFRecordReader, is_tfrecord
from bsnas.engine.data.preparing.formats.webdataset import WebDatasetReader
from bsnas.engine.host.errors import UserError

SourceFormat = Literal["auto", "folder", "parts", "classes", "imagenet", "csv", "webdataset", "tfrecord", "parquet"]

LOOKED_AT = 10_000
"""Files that are looked at to recognise a source."""


def open_source(source: Path, kind: SourceFormat, *, class_file: Path | None, val_labels: Path | None) -> Reader:
    """The reader of a source; `auto` looks at what is there. Raises UserError for what no reader takes."""
    if not source.exists():
        raise UserError(f"source {source} does not exist; give a directory, or a CSV file of path and label")
    if kind == "auto":
        kind = _recognise(source)
    classes = None
    if class_file is not None:
        if kind in ("folder", "parts", "classes", "imagenet"):
            raise UserError(f"classes {class_file} goes with labels that are numbers, not with {kind}; leave it out")
        try:
            classes = read_class_names(class_file.read_text("utf-8-sig"), str(class_file))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"classes {class_file} cannot be read: {error}; give one class name per line") from None
    if kind == "imagenet":
        return ImageNetReader(source, val_labels)
    if val_labels is not None:
        raise UserError(f"val labels {val_labels} go with ImageNet's archives only, not with {kind}; leave them out")
    match kind:
        case "csv":
            return CsvReader(source, classes)
        case "webdataset":
            return WebDatasetReader(source, classes)
        case "tfrecord":
            return TFRecordReader(source, classes)
        case "parquet":
            return ParquetReader(source, classes)
        case "parts" | "classes":
            return ImageFolderReader(source, kind)
    return ImageFolderReader(source)


def _recognise(source: Path) -> SourceFormat:
    if source.is_file():
        if source.suffix.lower() in (".csv", ".tsv"):
            return "csv"
        raise UserError(f"source {source} is a file that is no .csv; give a directory, or set --format of {_names()}")
    if (source / TRAIN).exists():
        return "imagenet"
    archive = None if _has_class_directories(source) else _first_archive(source)
    if archive is not None:
        kinds: dict[str, SourceFormat] = {".parquet": "parquet", ".tar": "webdataset"}
        return kinds.get(archive.suffix, "tfrecord")
    lists = [path for path in sorted(source.iterdir()) if path.suffix.lower() in (".csv", ".tsv")]
    if lists and not any(path.is_dir() for path in source.iterdir()):
        raise UserError(f"source {source} holds {lists[0].name}; give that file itself as the source")
    return "folder"


def _has_class_directories(source: Path) -> bool:
    """Whether there is a directory below a directory: part/class or class alone with images, not shards."""
    parts = [part for part in source.iterdir() if part.is_dir() and not is_hidden(part.name)]
    return any(path.is_dir() and not is_hidden(path.name) for part in parts for path in part.iterdir())


def _first_archive(source: Path) -> Path | None:
    """A Parquet, tar or TFRecord file among the first files of a directory."""
    some = (path for path in islice(source.rglob("*"), LOOKED_AT) if not is_hidden(str(path.relative_to(source))))
    return next((path for path in some if path.suffix in (".parquet", ".tar") or is_tfrecord(path)), None)


def _names() -> str:
    return ", ".join(get_args(SourceFormat))
