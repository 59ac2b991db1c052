"""The index of a plain directory: every image is checked once, what is known is kept, only what is new is checked."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bsnas.engine.data.checking.image_facts import Fault, ImageFacts
from bsnas.engine.data.checking.memo import CheckJournal, Outcome, stamp_of
from bsnas.engine.data.checking.quarantine import describe, refuse_too_many, write_quarantine
from bsnas.engine.data.file_list import FileList, FoundFile, Listing
from bsnas.engine.host.atomic import locked
from bsnas.engine.host.console import Progress


def index_folder(
    directory: Path, listing: Listing, place: Path, *, channels: int, threads: int, max_broken: float
) -> FileList:
    """The decodable images of a listing of `directory`; what is known is kept in the directory `place`.

    Images that cannot be used are listed in `place`/NAME-quarantine.tsv and told. Raises UserError when they are more
    than the share `max_broken`.
    """
    key = hashlib.sha256(f"{directory}\0{channels}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    stem = f"{directory.parent.name}-{directory.name}-{key}"
    with locked(place / f"{stem}.lock"), CheckJournal(place / f"{stem}.tsv") as journal:
        fresh = check_new(directory, listing.files, journal, channels=channels, threads=threads)
        outcomes = [journal.find(file.name, stamp_of(file.size, file.mtime)) for file in listing.files]
        broken = [
            (file.name, o.reason) for file, o in zip(listing.files, outcomes, strict=True) if isinstance(o, Fault)
        ]
        set_aside = [*listing.problems, *broken]
        listed = place / f"{stem}-quarantine.tsv"
        if set_aside:
            write_quarantine(listed, set_aside)
    total = len(listing.files) + len(listing.problems)
    refuse_too_many(set_aside, total, max_broken, str(directory), listed)
    if set_aside and fresh:
        print(f"{describe(set_aside, total, str(directory))}; they are set aside and listed in {listed}")
    return to_file_list(directory, listing.files, outcomes)


def check_new(
    directory: Path, files: Sequence[FoundFile], journal: CheckJournal, *, channels: int, threads: int
) -> bool:
    """Check what the journal does not know yet; whether there was anything."""
    unknown = [file for file in files if journal.find(file.name, stamp_of(file.size, file.mtime)) is None]
    if not unknown:
        return False
    from bsnas.engine.data.checking.image_check import (  # loads DALI, which most calls do not need
        ImageChecker,
        read_file,
    )

    def images() -> Iterator[tuple[FoundFile, Callable[[], bytes]]]:
        for file in unknown:
            yield file, partial(read_file, os.path.join(directory, file.name))

    checker = ImageChecker(channels=channels, threads=threads)
    with Progress(f"checking images of {directory}", len(unknown), unit="images") as progress:
        for file, _, outcome in checker.check(images()):
            journal.add(file.name, stamp_of(file.size, file.mtime), outcome)
            progress.advance()
    return True


def to_file_list(directory: Path, files: Sequence[FoundFile], outcomes: Sequence[Outcome | None]) -> FileList:
    """The files whose outcome is an image."""
    good = [(file, facts) for file, facts in zip(files, outcomes, strict=True) if isinstance(facts, ImageFacts)]
    names = tuple(file.name for file, _ in good)
    return FileList(
        root=directory,
        names=names,
        files=names,
        labels=np.array([file.label for file, _ in good], np.int64),
        sizes=np.array([facts.size for _, facts in good], np.int64),
        shapes=np.array([(f.height, f.width, f.channels) for _, f in good], np.int32).reshape(-1, 3),
        digests=np.array([facts.digest for _, facts in good], "S32"),
    )
