"""ImageFolder: train/CLASS/IMAGE with val/CLASS/IMAGE (or test/), or CLASS/IMAGE alone."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from bsnas.engine.data.checking.outcomes import stamp_of
from bsnas.engine.data.contents import read_file
from bsnas.engine.data.file_list import (
    HIDDEN,
    Listing,
    count_files,
    directories_in,
    images_below,
    is_hidden,
    list_images,
)
from bsnas.engine.data.preparing.formats.sample import (
    EVERYTHING,
    PARTS,
    TEST_LEFT_OUT,
    Item,
    LeftOut,
    Problem,
    Sample,
    safe,
    take_test_for_val,
)
from bsnas.engine.host.errors import UserError

Layout = Literal["folder", "parts", "classes"]


class ImageFolderReader:
    """Images by directory: the first level is the class, deeper ones are part of the name."""

    def __init__(self, directory: Path, layout: Layout = "folder") -> None:
        """`layout`: whether there are parts above the classes; `folder` looks.

        Raises UserError for a directory without class directories, or where both can be meant.
        """
        parts = _parts(directory, layout)
        used = take_test_for_val(set(parts))
        self._left_out = [
            LeftOut(TEST_LEFT_OUT, sum(1 for _ in images_below(directory / parts[part])))
            for part in parts
            if part not in used
        ]
        folders = {used[part]: directory / parts[part] for part in used} or {EVERYTHING: directory}
        if parts:
            with os.scandir(directory) as entries:
                for entry in (entry for entry in entries if entry.name not in parts.values()):
                    rule = HIDDEN if is_hidden(entry.name) else "outside of the parts"
                    self._left_out.append(LeftOut(rule, count_files(entry)))
        self._listings: list[tuple[str, Path, Listing]] = []
        for part, folder in sorted(folders.items()):
            classes = _folders(folder)
            if not classes:
                raise UserError(f"{folder} holds no class directories; it must be CLASS/IMAGE")
            self._listings.append((part, folder, list_images(folder, classes)))
        self.total_bytes = sum(file.size for _, _, listing in self._listings for file in listing.files)

    def samples(self) -> Iterator[Item]:
        yield from self._left_out
        for part, folder, listing in self._listings:
            yield from (Problem(f"{part}/{name}", reason) for name, reason in listing.problems)
            yield from (LeftOut(rule, count) for rule, count in listing.left_out.items())
            for file in listing.files:
                path = os.path.join(folder, file.name)
                yield Sample(
                    part=part,
                    name="/".join(map(safe, file.name.split("/"))),
                    load=partial(read_file, path),
                    stamp=stamp_of(file.size, file.mtime),
                    file=path,
                )


def _parts(directory: Path, layout: Layout) -> dict[str, str]:
    """The directory of each part; none where all directories are classes."""
    named = [folder for folder in _folders(directory) if folder.lower() in PARTS]
    if layout == "parts" and not named:
        raise UserError(f"{directory} holds none of {', '.join(PARTS)}; give --format classes for CLASS/IMAGE alone")
    if layout == "classes" or (layout == "folder" and not _are_parts(directory, named)):
        return {}
    parts = {PARTS[folder.lower()]: folder for folder in named}
    if len(parts) < len(named):
        raise UserError(
            f"{directory} holds {', '.join(named)}, of which several name the same part; join them, or give "
            "--format classes where they are classes"
        )
    return parts


def _are_parts(directory: Path, named: Sequence[str]) -> bool:
    """Whether directories with names of parts hold classes, and are no classes themselves, as COCO's train.

    Raises UserError where both can be meant: such a directory holds directories, and others beside it hold images.
    """
    holders = [name for name in named if _folders(directory / name)]
    beside = [name for name in _folders(directory) if name not in named and any(images_below(directory / name))]
    if holders and beside:
        raise UserError(
            f"{directory} can be read in two ways: {', '.join(holders)} as parts of a data set, without "
            f"{', '.join(beside[:3])}; or each of its directories as a class; say which with --format parts or "
            "--format classes"
        )
    return bool(holders) or not (beside or any(any(images_below(directory / name)) for name in named))


def _folders(directory: Path) -> list[str]:
    try:
        return directories_in(directory)
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}; mend or remove it") from None
