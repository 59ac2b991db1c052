"""ImageFolder: train/CLASS/IMAGE with val/CLASS/IMAGE (or test/), or CLASS/IMAGE alone."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bsnas.engine.data.checking.outcomes import stamp_of
from bsnas.engine.data.contents import read_file
from bsnas.engine.data.file_list import Listing, list_images
from bsnas.engine.data.preparing.formats.sample import (
    EVERYTHING,
    PARTS,
    Problem,
    Sample,
    part_of,
    safe,
    take_test_for_val,
)
from bsnas.engine.host.errors import UserError


class ImageFolderReader:
    """Images by directory: the first level is the class, deeper ones are part of the name."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError for a directory without class directories."""
        parts = {
            part: folder for folder in _folders(directory) if (part := part_of(folder)) and folder.lower() in PARTS
        }
        used = take_test_for_val(set(parts))
        folders = {used[part]: directory / parts[part] for part in used} or {EVERYTHING: directory}
        self._listings: list[tuple[str, Path, Listing]] = []
        for part, folder in sorted(folders.items()):
            classes = _folders(folder)
            if not classes:
                raise UserError(f"{folder} holds no class directories; it must be CLASS/IMAGE")
            self._listings.append((part, folder, list_images(folder, classes)))
        self.total_bytes = sum(file.size for _, _, listing in self._listings for file in listing.files)

    def samples(self) -> Iterator[Sample | Problem]:
        for part, folder, listing in self._listings:
            yield from (Problem(f"{part}/{name}", reason) for name, reason in listing.problems)
            for file in listing.files:
                path = os.path.join(folder, file.name)
                yield Sample(
                    part=part,
                    name="/".join(map(safe, file.name.split("/"))),
                    load=partial(read_file, path),
                    stamp=stamp_of(file.size, file.mtime),
                    file=path,
                )


def _folders(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}; mend or remove it") from None
