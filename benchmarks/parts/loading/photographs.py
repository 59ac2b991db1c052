"""Generated JPEGs that cost as much to decode as photographs of ImageNet's mean size (500x375, 110 KB).

Each is noise with an amplitude spectrum of 1/f^a, a between 0.8 and 1.5, as natural images have (colour channels
correlated), a dozen translucent ellipses and rectangles for edges, and sensor noise of random strength; JPEG quality
94. The noise sets the entropy: 112 KB an image, with a standard deviation of 16 KB.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bsnas.engine.host.atomic import build_directory

CLASSES = ("a", "b", "c", "d")
QUALITY = 94
EXPONENTS = (0.8, 1.5)  # of the falling amplitude spectrum: from rough to smooth


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One generated photograph."""
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.hypot(rows * height, columns * width) / max(width, height)
    frequency[0, 0] = 1
    frequency **= rng.uniform(*EXPONENTS)
    fields = []
    for _ in range(4):
        spectrum = rng.standard_normal((height, width // 2 + 1)) + 1j * rng.standard_normal((height, width // 2 + 1))
        field = np.fft.irfft2(spectrum / frequency, s=(height, width))
        fields.append((field - field.mean()) / field.std())
    luminance, *chroma = fields
    pixels = 45 * (0.85 * luminance[..., None] + 0.35 * np.stack(chroma, -1)) + rng.uniform(90, 150, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        box = (left, top, left + rng.integers(10, width // 2), top + rng.integers(10, height // 2))
        colour = (*rng.integers(0, 256, 3).tolist(), int(rng.integers(90, 220)))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)([int(value) for value in box], fill=colour)
    noisy = np.asarray(image) + rng.standard_normal((height, width, 1)) * rng.uniform(1.5, 10)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_photographs(directory: Path, count: int) -> Path:
    """train/ and val/ of `count` photographs each in four classes, three quarters of them landscape; made once."""

    def build(work: Path) -> None:
        rng = np.random.default_rng(0)
        for part, images in (("train", count), ("val", len(CLASSES))):
            for index in range(images):
                folder = work / part / CLASSES[index % len(CLASSES)]
                folder.mkdir(parents=True, exist_ok=True)
                size = (500, 375) if rng.random() < 0.75 else (375, 500)
                photograph(rng, *size).save(folder / f"{index:05}.jpg", quality=QUALITY)

    return build_directory(directory, build)


def write_resized(source: Path, directory: Path, shorter: int = 256) -> Path:
    """The copy that engine/prepare.py writes with `--resize`; made once. Loads DALI, as the caller may not want to."""

    def build(work: Path) -> None:
        from bsnas.engine.data.preparing.formats.image_folder import ImageFolderReader
        from bsnas.engine.data.preparing.preparation import Preparation, prepare
        from bsnas.engine.data.preparing.stored_images import Resizing

        preparation = Preparation(
            output=work,
            resizing=Resizing(shorter=shorter, quality=90, channels=3),
            val_per_class=1,
            split_seed=0,
            max_broken=0.0,
            max_megapixels=1,
            threads=2,
        )
        prepare(ImageFolderReader(source), preparation)

    return build_directory(directory, build)
