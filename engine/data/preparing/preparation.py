"""What engine/prepare.py does: samples of any source to checked images, their index, split, shards and picture.

Every finished image is noted in a file, and files appear whole or not at all: a preparation that is killed goes on
where it was and ends with the same index. index.json is written last and makes the rest valid.
"""

import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bsnas.engine.data.checking.image_check import Checked, ImageChecker
from bsnas.engine.data.checking.outcomes import Fault, ImageFacts, KnownOutcomes, Outcome
from bsnas.engine.data.checking.quarantine import Entry, refuse_too_many, write_quarantine
from bsnas.engine.data.file_list import FileList, require_two_classes
from bsnas.engine.data.index import PARTS, write_index
from bsnas.engine.data.preparing.formats.sample import EVERYTHING, LeftOut, Problem, Reader, Sample, UniqueNames
from bsnas.engine.data.preparing.shard_writer import write_shards
from bsnas.engine.data.preparing.stored_images import Resizing, stored_name, write_image
from bsnas.engine.data.split import count_of, default_name, hash_rank, load_or_create_split
from bsnas.engine.host.atomic import locked
from bsnas.engine.host.console import Progress
from bsnas.engine.host.errors import UserError

QUARANTINE = "quarantine.tsv"
WORK = ".prepare"
"""What a preparation needs to go on, below the output directory."""
MB = 1e6


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How a source is prepared."""

    output: Path
    channels: int = 3
    resizing: Resizing | None = None
    shard_bytes: int | None = None
    """Size of WebDataset shards to write; None for none."""
    val_share: float | None = None
    """Share of the images to take as test images, of a source that names none."""
    val_per_class: float
    split_seed: int
    max_broken: float
    max_megapixels: int
    threads: int


@dataclass(frozen=True)
class Kept:
    """A sample that can be used, without what loads it."""

    part: str
    name: str
    file: str
    facts: ImageFacts

    @property
    def class_name(self) -> str:
        return self.name.split("/", 1)[0]


@dataclass
class Found:
    """What a source holds."""

    kept: list[Kept] = field(default_factory=list)
    set_aside: list[Entry] = field(default_factory=list)
    total: int = 0
    """Images, those set aside among them: kept and set aside add up to it."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that are no images, by rule."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A finished preparation."""

    output: Path
    classes: tuple[str, ...]
    parts: dict[str, FileList]
    search_val: np.ndarray
    """Positions of the search-validation images in the training part."""
    set_aside: list[Entry]
    left_out: dict[str, int]
    """Files that are no images, by rule."""
    kinds: dict[str, int]
    """Images per file format."""


def prepare(reader: Reader, preparation: Preparation) -> Prepared:
    """Prepare a source. Raises UserError for too many broken images, a class too small, or a place without room."""
    output = preparation.output
    _refuse_foreign(output)
    with locked(output / WORK / "lock"):
        found = check_samples(reader, preparation)
        _refuse_lost_test_images(found.set_aside, found.kept, output / QUARANTINE)
        kept, missing = _without_unknown_classes(_with_parts(found.kept, preparation))
        found.set_aside.extend(missing)
        found.set_aside.sort()
        _refuse_lost_test_images(found.set_aside, kept, output / QUARANTINE)
        write_quarantine(output / QUARANTINE, found.set_aside)
        refuse_too_many(found.set_aside, found.total, preparation.max_broken, "the source", output / QUARANTINE)
        classes = tuple(sorted({image.class_name for image in kept if image.part == "train"}))
        if not classes:
            raise UserError(f"the source holds no training images; {found.total} were found in all")
        require_two_classes(classes, "the source")
        parts = {part: _file_list(output, [image for image in kept if image.part == part], classes) for part in PARTS}
        where = output / default_name(preparation.val_per_class, preparation.split_seed)
        where.unlink(missing_ok=True)
        split = load_or_create_split(
            where, output, classes, parts["train"], per_class=preparation.val_per_class, seed=preparation.split_seed
        )
        if preparation.shard_bytes is not None:
            parts = {part: write_shards(output, part, files, classes, preparation.shard_bytes, preparation.threads)
                     for part, files in parts.items()}  # fmt: skip
        about = {
            "split": {"per_class": preparation.val_per_class, "seed": preparation.split_seed, "file": where.name},
            "set_aside": len(found.set_aside),
            "resized": preparation.resizing.stamp if preparation.resizing else None,
        }
        write_index(output, classes, preparation.channels, parts, about)
        _remove_unused(output, parts)
    return Prepared(
        output=output,
        classes=classes,
        parts=parts,
        search_val=split.indices,
        set_aside=found.set_aside,
        left_out=dict(found.left_out),
        kinds=dict(Counter(image.facts.kind for image in kept).most_common()),
    )


def _refuse_lost_test_images(set_aside: Sequence[Entry], kept: Sequence[Kept], listed: Path) -> None:
    """Raises UserError where the source names test images and none of them can be used."""
    lost = [name for name, _ in set_aside if name.startswith("val/")]
    if lost and kept and not any(image.part == "val" for image in kept):
        write_quarantine(listed, set_aside)
        raise UserError(
            f"all {len(lost)} test images of the source are set aside, the first is {lost[0]}; mend them, the reasons "
            f"are in {listed}"
        )


# ---- every image once


def check_samples(reader: Reader, preparation: Preparation) -> Found:
    """Check, and store where needed, every sample that is not known yet."""
    found, described = Found(), _settings(preparation)
    unique = UniqueNames(lambda part, name: stored_name(part, name, preparation.resizing))
    storing: deque[tuple[Sample, Future[Outcome]]] = deque()
    with (
        KnownOutcomes(preparation.output / WORK / "checked.tsv") as known,
        Progress("preparing images", reader.total_bytes / MB, unit="MB") as progress,
        ThreadPoolExecutor(max(1, preparation.threads)) as pool,
        ImageChecker[Sample](
            channels=preparation.channels,
            threads=preparation.threads,
            max_megapixels=preparation.max_megapixels,
            reencoded=preparation.resizing is not None,
        ) as checker,
    ):

        def note(sample: Sample, outcome: Outcome) -> None:
            progress.advance(int(sample.stamp.split(":")[0]) / MB)
            if isinstance(outcome, Fault):
                found.set_aside.append((sample.full_name, outcome.reason))
            else:
                file = _stored_name(sample, preparation) or os.path.abspath(str(sample.file))
                found.kept.append(Kept(sample.part, sample.name, file, outcome))

        def store(checked: list[Checked[Sample]], most_waiting: int) -> None:
            """Store images in threads, and take in those that are done; they stay in order."""
            for sample, content, outcome in checked:
                storing.append((sample, pool.submit(_store, sample, content, outcome, preparation)))
            while len(storing) > most_waiting:
                sample, stored = storing.popleft()
                known.add(sample.full_name, f"{sample.stamp}:{described}", stored.result())
                note(sample, stored.result())

        for item in reader.samples():
            if isinstance(item, LeftOut):
                found.left_out += Counter({item.rule: item.count})
                continue
            found.total += 1
            if isinstance(item, Problem):
                found.set_aside.append((item.name, item.reason))
            else:
                sample = replace(item, name=unique.of(item.part, item.name))
                outcome = known.find(sample.full_name, f"{sample.stamp}:{described}")
                if outcome is None or not _is_there(sample, outcome, preparation):
                    store(checker.add(sample, sample.load), 8 * preparation.threads)
                else:
                    note(sample, outcome)
        store(checker.rest(), 0)
    return found


def _stored_name(sample: Sample, preparation: Preparation) -> str | None:
    """Where the prepared directory keeps the image itself; None when it stays where it is."""
    resizing = preparation.resizing
    kept_as_is = sample.file is not None and resizing is None
    return None if kept_as_is else stored_name(sample.part, sample.name, resizing)


def _store(sample: Sample, content: bytes, outcome: Outcome, preparation: Preparation) -> Outcome:
    """Write the image where the prepared directory keeps it; its facts as written."""
    name = _stored_name(sample, preparation)
    if name is None or isinstance(outcome, Fault):
        return outcome
    max_pixels = preparation.max_megapixels * 1_000_000
    return write_image(content, outcome, preparation.output / name, preparation.resizing, max_pixels)


def _is_there(sample: Sample, outcome: Outcome, preparation: Preparation) -> bool:
    """Whether a stored image is still in its place."""
    name = _stored_name(sample, preparation)
    if name is None or isinstance(outcome, Fault):
        return True
    try:
        return (preparation.output / name).stat().st_size == outcome.size
    except OSError:
        return False


def _settings(preparation: Preparation) -> str:
    """What an outcome depends on besides the image."""
    resized = preparation.resizing.stamp if preparation.resizing else "-"
    return f"c{preparation.channels}m{preparation.max_megapixels}r{resized}"


# ---- parts and classes


def _with_parts(kept: Sequence[Kept], preparation: Preparation) -> list[Kept]:
    """Choose test images where the source names none: those of each class with the smallest hash of (seed, name)."""
    named = {image.part for image in kept}
    share = preparation.val_share
    if "val" in named:
        if share is not None:
            raise UserError(f"the source has test images, so val share {share} has no meaning; leave it out")
        return list(kept)
    if share is None:
        raise UserError(
            "the source names no test images (val/ or test/, or a column of parts); set a share of each class aside "
            "with --val-share 0.1"
        )
    classes: dict[str, list[Kept]] = {}
    for image in kept:
        classes.setdefault(image.class_name, []).append(image)
    chosen: set[str] = set()
    for images in classes.values():
        images.sort(key=lambda image: (hash_rank(preparation.split_seed, f"test {image.name}"), image.name))
        chosen.update(image.name for image in images[: count_of(share, len(images))])
    return [
        Kept("val" if image.name in chosen else "train", image.name, image.file, image.facts)
        for image in kept
        if image.part in (EVERYTHING, "train")
    ]


def _without_unknown_classes(kept: list[Kept]) -> tuple[list[Kept], list[Entry]]:
    """Test images of classes that have no training image are set aside."""
    known = {image.class_name for image in kept if image.part == "train"}
    unknown = [image for image in kept if image.class_name not in known]
    reasons = [
        (f"val/{image.name}", f"is of class {image.class_name}, which has no training image") for image in unknown
    ]
    return [image for image in kept if image.class_name in known], reasons


def _file_list(output: Path, images: list[Kept], classes: Sequence[str]) -> FileList:
    label = {name: place for place, name in enumerate(classes)}
    images = sorted(images, key=lambda image: (label[image.class_name], image.name))
    labels = [label[image.class_name] for image in images]
    names, stored = [image.name for image in images], [image.file for image in images]
    return FileList.of(output, names, stored, labels, [image.facts for image in images])


OWN = ("images", "shards")
"""Directories that a preparation writes, and clears of what the index does not name."""


def _refuse_foreign(output: Path) -> None:
    """Raises UserError for an output whose directories somebody else wrote."""
    foreign = [name for name in OWN if (output / name).exists()]
    if foreign and not (output / WORK / "lock").exists():
        raise UserError(
            f"output {output} holds {foreign[0]}/, which engine/prepare.py did not write; choose an empty directory"
        )


def _remove_unused(output: Path, parts: dict[str, FileList]) -> None:
    """Files that no part names: of an earlier call, of a killed one, or loose images whose content is in shards now."""
    named = {file for files in parts.values() for file in files.files if not os.path.isabs(file)}
    for top in OWN:
        for directory, _, files in os.walk(output / top, topdown=False):
            for name in files:
                path = os.path.join(directory, name)
                relative = os.path.relpath(path, output)
                if relative not in named and os.path.splitext(relative)[0] + ".tar" not in named:
                    os.unlink(path)
            if not os.listdir(directory):
                os.rmdir(directory)


def summary(prepared: Prepared) -> dict[str, Any]:
    """Figures of a preparation, for people and for --json."""
    counts = {
        part: np.bincount(files.labels, minlength=len(prepared.classes)) for part, files in prepared.parts.items()
    }
    train = counts["train"]
    digests = {part: Counter(files.digests.tolist()) for part, files in prepared.parts.items()}
    shapes = np.concatenate([files.shapes for files in prepared.parts.values()])
    rarest = np.argsort(train, kind="stable")[:5]
    return {
        "classes": len(prepared.classes),
        "images": {part: len(files) for part, files in prepared.parts.items()},
        "search_validation_images": len(prepared.search_val),
        "bytes": int(sum(files.sizes.sum() for files in prepared.parts.values())),
        "images_per_class": {"min": int(train.min()), "median": float(np.median(train)), "max": int(train.max())},
        "imbalance": float(train.max() / train.min()),
        "rarest_classes": {prepared.classes[i]: int(train[i]) for i in rarest},
        "classes_without_test_images": [prepared.classes[i] for i in np.flatnonzero(counts["val"] == 0)],
        "formats": prepared.kinds,
        "shorter_side": [int(np.percentile(shapes[:, :2].min(1), p)) for p in (0, 50, 100)],
        "channels_of_files": {
            str(c): int(n) for c, n in zip(*np.unique(shapes[:, 2], return_counts=True), strict=True)
        },
        "same_content_within_train": int(sum(n - 1 for n in digests["train"].values())),
        "test_images_also_in_train": int(sum(n for d, n in digests["val"].items() if d in digests["train"])),
        "left_out": prepared.left_out,
        "set_aside": len(prepared.set_aside),
        "set_aside_by_reason": dict(Counter(_kind_of(reason) for _, reason in prepared.set_aside).most_common()),
    }


def _kind_of(reason: str) -> str:
    """A reason without what belongs to the single image."""
    return reason.split(" (")[0].split(", ")[0]
