"""Training and serving see the same pixels: every format, mode, depth and orientation that training takes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bsnas.benchmarks.serve_check import served_pixels
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.loading.decode import decode_images
from bsnas.engine.data.preparing.stored_images import Resizing
from tests.engine.data.cases import folder_config
from tests.engine.data.source_cases import prepare_source

Y, X = np.mgrid[0:48, 0:64]
COLOUR = Image.fromarray(np.stack([X * 4, Y * 5, (X + Y) * 2], -1).clip(0, 255).astype(np.uint8))
GRAY = COLOUR.convert("L")
DEEP = np.asarray(GRAY).astype(np.uint16) * 257


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray((X * 4).clip(0, 255).astype(np.uint8)))
    return image


MODES = {
    "1": COLOUR.convert("1"), "L": GRAY, "LA": with_alpha(GRAY), "P": COLOUR.quantize(64), "RGB": COLOUR,
    "RGBA": with_alpha(COLOUR), "CMYK": COLOUR.convert("CMYK"), "YCbCr": COLOUR.convert("YCbCr"),
    "LAB": COLOUR.convert("LAB"), "I16": Image.fromarray(DEEP), "I32": Image.fromarray(DEEP.astype(np.int32)),
    "F": Image.fromarray(np.asarray(GRAY).astype(np.float32)),
}  # fmt: skip
FORMATS: dict[str, dict[str, Any]] = {
    ".jpg": {"format": "JPEG", "quality": 95}, ".png": {"format": "PNG"}, ".bmp": {"format": "BMP"},
    ".ppm": {"format": "PPM"}, ".webp": {"format": "WEBP", "lossless": True}, ".tif": {"format": "TIFF"},
    ".jp2": {"format": "JPEG2000"},
}  # fmt: skip
NOT_TAKEN = {
    "F.tif": "floating point", "I32.tif": "not read by the decoder", "LA.tif": "read differently",
    "LAB.tif": "read differently", "YCbCr.jp2": "read differently", "LA.jp2": "not read by the decoder",
    "CMYK.jp2": "not read by the decoder", "1.tif": "not read by the decoder", "F.ppm": "floating point",
}  # fmt: skip
"""Of what Pillow can write, what is set aside, and a word of the reason."""


def write_all(folder: Path) -> list[str]:
    """Every mode in every format that Pillow writes it in, and orientations 1 to 8. Returns the names."""
    names = []
    for part in ("train", "val"):
        for label in ("one", "two"):
            (folder / part / label).mkdir(parents=True)
            for number in range(3):
                COLOUR.save(folder / part / label / f"plain{number}.png")
    for suffix, options in FORMATS.items():
        for mode, image in MODES.items():
            buffer = io.BytesIO()
            try:
                image.save(buffer, **options)
            except (OSError, ValueError, KeyError):
                continue
            names.append(f"{mode}{suffix}")
            (folder / "train" / "one" / names[-1]).write_bytes(buffer.getvalue())
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x112] = orientation
            if suffix in (".jpg", ".png", ".webp", ".tif"):
                names.append(f"turned{orientation}{suffix}")
                COLOUR.save(folder / "train" / "one" / names[-1], exif=exif, **options)
    return names


@pytest.mark.parametrize("resize", [None, 40])
@pytest.mark.parametrize("channels", [3, 1])
def test_every_image_that_is_taken_is_decoded_alike(tmp_path, channels, resize):
    names = write_all(tmp_path / "images")
    config = folder_config(
        tmp_path / "images", tmp_path / "cache", channels=channels, resolution=32, resize=resize, max_broken=0.5,
        val_per_class=1, mean=(0.5,), std=(0.25,),
    )  # fmt: skip
    files = open_dataset(config).everything
    taken = {Path(name).name for name in files.names}
    assert set(names) - taken <= NOT_TAKEN.keys()
    assert len(taken) > 40
    for name, pixels in zip(files.names, np.concatenate(list(decode_images(files, config))), strict=True):
        served = served_pixels(tmp_path / "images" / "train" / name, 32, resize, channels)
        difference = np.abs(served.astype(int) - pixels).mean()
        assert difference <= 3, f"{name}: {difference:.2f} grey levels"


def test_resized_copies_are_decoded_alike_too(tmp_path):
    write_all(tmp_path / "images")
    resizing = Resizing(shorter=32, quality=95, channels=3)
    prepared = prepare_source(tmp_path / "images", tmp_path / "out", resizing=resizing, max_broken=0.5, val_per_class=1)
    files = prepared.parts["train"]
    config = folder_config(tmp_path / "out", tmp_path / "cache", resolution=32, val_per_class=1)
    for name, pixels in zip(files.names, np.concatenate(list(decode_images(files, config))), strict=True):
        served = served_pixels(tmp_path / "images" / "train" / name, 32, None, 3)
        assert np.abs(served.astype(int) - pixels).mean() <= 6, name


def test_what_is_set_aside_has_its_reason(tmp_path):
    names = write_all(tmp_path / "images")
    prepared = prepare_source(tmp_path / "images", tmp_path / "out", max_broken=0.5, val_per_class=1)
    reasons = {Path(name).name: reason for name, reason in prepared.set_aside}
    assert reasons.keys() <= NOT_TAKEN.keys() & set(names)
    for name, reason in reasons.items():
        assert NOT_TAKEN[name] in reason, f"{name} {reason}"
        assert "convert it" in reason
        assert "damaged" not in reason
