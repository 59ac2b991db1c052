"""ImageNet as it is distributed: ILSVRC2012_img_train.tar (a tar file per class inside), ILSVRC2012_img_val.tar, and
what names the classes of the validation images: the devkit, or a list of file names and synsets."""

import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO

from bsnas.engine.data.file_list import HIDDEN, is_hidden
from bsnas.engine.data.preparing.formats.archives import range_reader, regular_members, stamp_of_archive
from bsnas.engine.data.preparing.formats.sample import Item, LeftOut, Problem, Sample, sample_name
from bsnas.engine.host.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
META = "data/meta.mat"
LABEL_FILES = ("LOC_val_solution.csv", "val_labels.txt", "ILSVRC2012_validation_synset_labels.txt", "val.txt")
SYNSET = re.compile(r"n\d{8}")
VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
MAX_DEVKIT_BYTES = 64 * 2**20
MAX_CLASS_BYTES = 4 * 2**30


class ImageNetReader:
    """Train and validation images straight from the archives; nothing is unpacked twice."""

    def __init__(self, directory: Path, val_labels: Path | None = None) -> None:
        """`val_labels`: lines of file name and synset; by default the devkit or a known list in the directory."""
        self._train, self._val = directory / TRAIN, directory / VAL
        for file in (self._train, self._val):
            if not file.is_file():
                raise UserError(f"{file} is missing; ImageNet needs {TRAIN}, {VAL} and {DEVKIT} in one directory")
        self._labels = _val_synsets(directory, val_labels)
        self.total_bytes = self._train.stat().st_size + self._val.stat().st_size

    def samples(self) -> Iterator[Item]:
        yield from self._train_samples()
        yield from self._val_samples()

    def _train_samples(self) -> Iterator[Item]:
        with open(self._train, "rb") as archive:
            for outer, fault in regular_members(self._train, max_bytes=MAX_CLASS_BYTES):
                name = Path(outer.name).name
                if is_hidden(outer.name):
                    yield LeftOut(HIDDEN)
                    continue
                match = re.fullmatch(r"(n\d{8})\.tar", name)
                if fault or not match:
                    yield Problem(f"{TRAIN}/{name}", fault or "is not named nXXXXXXXX.tar, as the classes are")
                    continue
                inside = _Window(archive, outer.offset_data, outer.size)
                for member, fault in regular_members(self._train, handle=inside):  # type: ignore[arg-type]
                    if is_hidden(member.name):
                        yield LeftOut(HIDDEN)
                        continue
                    start = outer.offset_data + member.offset_data
                    yield _sample(self._train, "train", match[1], member, fault, start)

    def _val_samples(self) -> Iterator[Item]:
        for member, fault in regular_members(self._val):
            if is_hidden(member.name):
                yield LeftOut(HIDDEN)
                continue
            match = VAL_NAME.search(member.name)
            synset = self._labels.get(int(match[1])) if match else None
            if synset is None:
                yield Problem(f"{VAL}/{Path(member.name).name}", fault or "has no label in the ground truth")
            else:
                yield _sample(self._val, "val", synset, member, fault, member.offset_data)


def _sample(
    archive: Path, part: str, synset: str, member: tarfile.TarInfo, fault: str | None, start: int
) -> Sample | Problem:
    base = Path(member.name).name
    if fault:
        return Problem(f"{archive.name}/{synset}/{base}", fault)
    return Sample(
        part=part,
        name=sample_name(base, synset),
        load=range_reader(archive, start, member.size),
        stamp=stamp_of_archive(archive, member.size),
    )


class _Window:
    """A range of an open file, with what tarfile asks of a file."""

    def __init__(self, handle: IO[bytes], start: int, size: int) -> None:
        self._handle, self._start, self._size, self._place = handle, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self._place, 0)
        wanted = left if count < 0 else min(count, left)
        self._handle.seek(self._start + self._place)
        content = self._handle.read(wanted)
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place


def _val_synsets(directory: Path, given: Path | None) -> dict[int, str]:
    """Number of each validation image to its synset."""
    devkit = directory / DEVKIT
    known = [directory / name for name in LABEL_FILES if (directory / name).is_file()]
    if given is None and devkit.is_file():
        return _from_devkit(devkit)
    if given is None and not known:
        raise UserError(
            f"{directory} holds neither {DEVKIT} nor a list of validation labels; put one there, or give "
            "--val-labels FILE with lines of file name and synset"
        )
    return _from_list(given or known[0])


def _from_list(file: Path) -> dict[int, str]:
    """Lines that hold a file name and a synset (Kaggle's CSV too), or a synset alone in the order of the images."""
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}; give lines of file name and synset") from None
    labels: dict[int, str] = {}
    for number, line in enumerate(lines, 1):
        image, synset = VAL_NAME.search(line), SYNSET.search(line)
        if synset:
            labels[int(image[1]) if image else number] = synset[0]
    if not labels:
        raise UserError(f"{file} names no synsets; give lines like ILSVRC2012_val_00000001.JPEG n01751748")
    return labels


def _from_devkit(devkit: Path) -> dict[int, str]:
    """The ground truth file's numbers through meta.mat's table of ILSVRC2012_ID and WNID."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    wanted = {META: b"", TRUTH: b""}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for member in tar:
                key = next((name for name in wanted if member.name.endswith(name)), None)
                if key and member.isreg() and member.size <= MAX_DEVKIT_BYTES:
                    content = tar.extractfile(member)
                    assert content is not None  # of a regular file
                    wanted[key] = content.read()
        synsets = loadmat(BytesIO(wanted[META]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        truth = [int(number) for number in wanted[TRUTH].split()]
    except (tarfile.TarError, OSError, EOFError, ValueError, KeyError, TypeError, IndexError, MatReadError) as error:
        raise UserError(f"{devkit} cannot be read ({error}); it must hold {META} and {TRUTH}") from None
    if not truth:
        raise UserError(f"{devkit} holds no {TRUTH}; bring it back, or give --val-labels FILE")
    return {number: names[label] for number, label in enumerate(truth, 1) if SYNSET.fullmatch(names.get(label, ""))}
