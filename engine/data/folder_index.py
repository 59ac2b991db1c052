"""The index of a plain directory: every image is checked once, what is known is kept, only what is new is checked."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bsnas.engine.data.checking.outcomes import Fault, ImageFacts, KnownOutcomes, Outcome, stamp_of
from bsnas.engine.data.checking.quarantine import describe, describe_left_out, refuse_too_many, write_quarantine
from bsnas.engine.data.contents import read_file
from bsnas.engine.data.file_list import FileList, FoundFile, Listing
from bsnas.engine.host.atomic import locked
from bsnas.engine.host.console import Progress


def index_folder(
    directory: Path, listing: Listing, cache: Path, *, channels: int, threads: int, max_broken: float
) -> FileList:
    """The decodable images of a listing of `directory`; what is known is kept in the directory `cache`.

    Images that cannot be used are listed in `cache`/NAME-quarantine.tsv and told. Raises UserError when they are more
    than the share `max_broken`.
    """
    key = hashlib.sha256(f"{directory}\0{channels}".encode("utf-8", "surrogateescape")).hexdigest()[:12]
    stem = f"{directory.parent.name}-{directory.name}-{key}"
    with locked(cache / f"{stem}.lock"), KnownOutcomes(cache / f"{stem}.tsv") as known:
        fresh = check_new(directory, listing.files, known, channels=channels, threads=threads)
        outcomes = [known.find(file.name, stamp_of(file.size, file.mtime)) for file in listing.files]
        broken = [
            (file.name, o.reason) for file, o in zip(listing.files, outcomes, strict=True) if isinstance(o, Fault)
        ]
        set_aside = [*listing.problems, *broken]
        listed = cache / f"{stem}-quarantine.tsv"
        if set_aside:
            write_quarantine(listed, set_aside)
    total = len(listing.files) + len(listing.problems)
    refuse_too_many(set_aside, total, max_broken, str(directory), listed)
    if set_aside and fresh:
        print(f"{describe(set_aside, total, str(directory))}; they are set aside and listed in {listed}")
    if listing.left_out and fresh:
        print(describe_left_out(listing.left_out, str(directory)))
    return to_file_list(directory, listing, outcomes)


def check_new(
    directory: Path, files: Sequence[FoundFile], known: KnownOutcomes, *, channels: int, threads: int
) -> bool:
    """Check what is not known yet; whether there was anything."""
    unknown = [file for file in files if known.find(file.name, stamp_of(file.size, file.mtime)) is None]
    if not unknown:
        return False
    # Loads DALI, which most calls do not need.
    from bsnas.engine.data.checking.image_check import Checked, ImageChecker

    with (
        ImageChecker[FoundFile](channels=channels, threads=threads) as checker,
        Progress(f"checking images of {directory}", len(unknown), unit="images") as progress,
    ):

        def note(checked: list[Checked[FoundFile]]) -> None:
            for file, _, outcome in checked:
                known.add(file.name, stamp_of(file.size, file.mtime), outcome)
                progress.advance()

        for file in unknown:
            note(checker.add(file, partial(read_file, os.path.join(directory, file.name))))
        note(checker.rest())
    return True


def to_file_list(directory: Path, listing: Listing, outcomes: Sequence[Outcome | None]) -> FileList:
    """The files whose outcome is an image."""
    good = [(file, facts) for file, facts in zip(listing.files, outcomes, strict=True) if isinstance(facts, ImageFacts)]
    names = [file.name for file, _ in good]
    labels, facts = [file.label for file, _ in good], [facts for _, facts in good]
    return FileList.of(directory, names, names, labels, facts, listing.made_at)
