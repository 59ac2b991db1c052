"""Images whose bytes are wrong, before they are checked or after: nothing may end a process by a signal or a traceback.

python -m bsnas.benchmarks.parts.faults.hostile_images FOLDER SEED before|after

reads a folder of images in which half of the files are spoilt at that moment, as training and evaluation do, and ends
with 0 after a line: `read N`, or `told: ...` with the message for the user.
"""

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bsnas.benchmarks.parts.faults.soak_pipeline import Report

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 90}), "progressive.jpg": ("JPEG", {"progressive": True}), "png": ("PNG", {}),
    "webp": ("WEBP", {}), "lossless.webp": ("WEBP", {"lossless": True}), "bmp": ("BMP", {}), "ppm": ("PPM", {}),
    "tif": ("TIFF", {}), "deflate.tif": ("TIFF", {"compression": "tiff_deflate"}), "jp2": ("JPEG2000", {}),
}  # fmt: skip
METADATA = ("JPEG", "PNG", "WEBP", "TIFF")
"""Formats that hold EXIF."""
FILES = 64
"""In a folder: as many as a batch of a decoder."""


def picture(rng: random.Random) -> Image.Image:
    """Noise of a random size and mode."""
    shape = rng.randrange(8, 80), rng.randrange(8, 80), 3
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, shape).astype(np.uint8)
    return Image.fromarray(pixels).convert(rng.choice(("RGB", "RGB", "RGB", "L")))


def encoded(image: Image.Image, suffix: str, rng: random.Random) -> bytes:
    """An image with odd metadata where its format holds some."""
    kind, options = FORMATS[suffix]
    more: dict[str, Any] = {}
    if kind in METADATA and rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x112], exif[0x10E] = rng.randrange(1, 9), "x" * rng.randrange(1, 40)
        more["exif"] = exif if kind == "TIFF" else exif.tobytes() + b"\0" * rng.randrange(2)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options, **more)
    return buffer.getvalue()


def spoilt(content: bytes, rng: random.Random) -> bytes:
    """Flipped, zeroed, cut, swapped or inserted bytes, anywhere or in the header."""
    changed, end = bytearray(content), rng.choice((64, len(content)))
    first, length = rng.randrange(2, min(end, len(content))), rng.choice((1, 4, 40))
    match rng.randrange(5):
        case 0:
            changed[first] ^= 1 << rng.randrange(8)
        case 1:
            changed[first : first + length] = bytes(length)
        case 2:
            return bytes(changed[:first])
        case 3:
            changed[first], changed[-first] = changed[-first], changed[first]
        case 4:
            changed[first:first] = bytes(rng.randrange(256) for _ in range(length))
    return bytes(changed)


def write_folder(folder: Path, seed: int) -> None:
    """Two classes of images in all formats, most of them for training."""
    rng = random.Random(seed)
    for number in range(FILES):
        suffix = rng.choice(tuple(FORMATS))
        file = folder / ("train", "train", "val")[number % 3] / ("one", "two")[number % 2] / f"{number}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture(rng), suffix, rng))


def spoil(folder: Path, seed: int) -> int:
    """Spoil half of the files. Returns how many."""
    rng = random.Random(f"{seed} spoilt")
    count = 0
    for file in sorted(folder.glob("*/*/*")):
        if rng.random() < 0.5:
            file.write_bytes(spoilt(file.read_bytes(), rng))
            count += 1
    return count


def read_folder(folder: Path, seed: int, moment: str) -> str:
    """What the reading ended with."""
    from bsnas.engine.data.dataset import DataConfig, open_dataset
    from bsnas.engine.data.loading.evaluation_set import evaluation_set
    from bsnas.engine.data.loading.loader import TrainLoader
    from bsnas.engine.host.errors import UserError

    config = DataConfig(
        source="folder", path=str(folder), resolution=16, val_per_class=1, max_broken=1.0, threads=4,
        cache_dir=str(folder.parent / f"{folder.name}-cache"),
    )  # fmt: skip
    count = spoil(folder, seed) if moment == "before" else 0
    try:
        dataset = open_dataset(config)
        if moment == "after":
            count = spoil(folder, seed)
        evaluation_set(dataset.everything, config)
        list(TrainLoader(dataset.train, config, batch_size=FILES // 2, seed=0).epoch(0))
    except UserError as error:
        return f"told of {count}: {error}"
    return f"read beside {count}"


def hostile_images(directory: Path, least: int) -> Report:
    """Folders until so many files were spoilt: two of three after the check, when each of them loaded in Pillow."""
    report, seed = Report(), 0
    while report.counts["files spoilt"] < least:
        moment, folder = ("after", "after", "before")[seed % 3], directory / f"images-{seed}"
        write_folder(folder, seed)
        command = [sys.executable, "-m", "bsnas.benchmarks.parts.faults.hostile_images", str(folder), str(seed), moment]
        done = subprocess.run(command, capture_output=True, text=True)
        line = (done.stdout.splitlines() or [""])[-1]
        held = done.returncode == 0 and line.startswith(("told of", "read beside"))
        report.expect(held, f"{folder.name}, spoilt {moment}: exit code {done.returncode}: {done.stderr[-300:]}")
        if held:
            count = int(line.split(":")[0].split()[2])
            report.counts["files spoilt"] += count
            report.counts[f"spoilt {moment} the check"] += count
            report.counts[f"folders {line.split()[0]}"] += 1
        elif len(report.failures) > 20:
            break
        seed += 1
    return report


if __name__ == "__main__":
    print(read_folder(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
