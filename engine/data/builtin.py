"""Where images come from: a directory, CIFAR-10, Fashion-MNIST or scikit-learn's digits, all in ImageFolder layout.

The built-in sources are written once into the cache directory, under a lock and by one rename, so any number
of processes may ask at once and an interrupted one leaves nothing half done.
"""

import gzip
import io
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from bsnas.engine.host.atomic import build_directory
from bsnas.engine.host.errors import UserError

FASHION_PACKAGE = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "0_tshirt_top",
    "1_trouser",
    "2_pullover",
    "3_dress",
    "4_coat",
    "5_sandal",
    "6_shirt",
    "7_sneaker",
    "8_bag",
    "9_ankle_boot",
)
DIGITS_TEST_SHARE = 0.2
DIGITS_SEED = 2020

Source = Literal["digits", "fashion-mnist", "cifar10", "folder"]
Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


def prepare_source(source: Source, path: str | None, cache: Path) -> Path:
    """The directory that holds train/ and val/; built-in sources are written on first use."""
    if source == "digits":
        return build_directory(cache / "digits", _write_digits)
    if source == "fashion-mnist":
        return build_directory(cache / "fashion-mnist", _write_fashion_mnist)
    if source == "cifar10":
        return build_directory(cache / "cifar10", _write_cifar10)
    root = Path(path or "").expanduser()
    if not root.is_dir():
        raise UserError(
            f"data path {root} is not a directory; give one that holds train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    return root.resolve()


def _write_digits(directory: Path) -> None:
    """1797 images of 8x8 as JPEG of quality 100; a fixed 20 % of each class is the test set."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    rng = np.random.default_rng(DIGITS_SEED)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        test[rng.permutation(members)[: round(DIGITS_TEST_SHARE * len(members))]] = True
    names = tuple(str(label) for label in range(10))
    _write_images(directory / "train", images[~test], labels[~test], names, ".jpg")
    _write_images(directory / "val", images[test], labels[test], names, ".jpg")


def _write_fashion_mnist(directory: Path) -> None:
    """70,000 images of 28x28 as PNG (lossless; it decodes as fast as JPEG at this size)."""
    raw = FASHION_PACKAGE if FASHION_PACKAGE.is_dir() else _download_fashion_mnist(directory / "raw")
    for part, prefix in (("train", "train"), ("val", "t10k")):
        images = _read_idx(raw / f"{prefix}-images-idx3-ubyte.gz")
        labels = _read_idx(raw / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
        _write_images(directory / part, images, labels, FASHION_CLASSES, ".png")
    shutil.rmtree(directory / "raw", ignore_errors=True)


def _download_fashion_mnist(directory: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(directory), download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"Fashion-MNIST is neither in {FASHION_PACKAGE} nor could it be downloaded ({error}); "
            "install Debian's package dataset-fashion-mnist or connect to the network"
        ) from None
    return directory / "FashionMNIST" / "raw"


def _write_cifar10(directory: Path) -> None:
    """60,000 images of 32x32 as PNG, from torchvision's download."""
    from torchvision.datasets import CIFAR10

    raw = directory / "raw"
    try:
        parts = {part: CIFAR10(str(raw), train=part == "train", download=True) for part in ("train", "val")}
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded ({error}); connect to the network, or give a directory of "
            "train/CLASS/IMAGE and val/CLASS/IMAGE with --data.source folder --data.path DIRECTORY"
        ) from None
    for part, data in parts.items():
        names = tuple(f"{label}_{name}" for label, name in enumerate(data.classes))
        _write_images(directory / part, data.data, np.array(data.targets, np.int64), names, ".png")
    shutil.rmtree(raw)


def _read_idx(path: Path) -> Images:
    """An idx file of bytes: magic 0x0000 0x08 ndim, then ndim big-endian sizes, then the values."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}; install Debian's package dataset-fashion-mnist again") from None
    ndim = content[3]
    shape = np.frombuffer(content, ">u4", ndim, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape.tolist())


def _write_images(
    directory: Path,
    images: Images,
    labels: Labels,
    classes: tuple[str, ...],
    suffix: str,
) -> None:
    options = {"quality": 100} if suffix == ".jpg" else {"compress_level": 1}
    form = "JPEG" if suffix == ".jpg" else "PNG"
    for name in classes:
        (directory / name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, form, **options)
        (directory / classes[label] / f"{index:05}{suffix}").write_bytes(buffer.getvalue())
