"""Pictures to look at: a grid of samples per class, and a grid of augmented samples."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageOps

from bsnas.engine.data.contents import read_image
from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.atomic import write_atomically

THUMBNAIL = 96
"""Pixels of a side."""
LABEL_WIDTH = 160
MAX_CLASSES = 40
PER_CLASS = 8


def class_sheet(files: FileList, classes: Sequence[str], target: Path) -> None:
    """Write a row of samples per class, spread over the class; of many classes, evenly chosen ones."""
    shown = sorted({round(i) for i in np.linspace(0, len(classes) - 1, min(MAX_CLASSES, len(classes)))})
    sheet = Image.new("RGB", (LABEL_WIDTH + PER_CLASS * THUMBNAIL, len(shown) * THUMBNAIL), "white")
    draw = ImageDraw.Draw(sheet)
    counts = np.bincount(files.labels, minlength=len(classes))
    for row, label in enumerate(shown):
        draw.text((4, row * THUMBNAIL + 4), f"{classes[label][:24]}\n{counts[label]} images", fill="black")
        members = np.flatnonzero(files.labels == label)
        chosen = members[np.linspace(0, len(members) - 1, min(PER_CLASS, len(members))).round().astype(int)]
        for column, place in enumerate(chosen.tolist()):
            sheet.paste(_thumbnail(files, place), (LABEL_WIDTH + column * THUMBNAIL, row * THUMBNAIL))
    _write(sheet, target)


def image_grid(images: npt.NDArray[np.uint8], columns: int, target: Path) -> None:
    """Write images [N, H, W, 1 or 3] row by row, small ones enlarged without smoothing."""
    side = images.shape[1]
    zoom = max(1, THUMBNAIL // side)
    grid = Image.new("RGB", (columns * side * zoom, -(-len(images) // columns) * side * zoom), "white")
    for place, image in enumerate(images):
        shown = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image[..., :3]).convert("RGB")
        row, column = divmod(place, columns)
        grid.paste(
            shown.resize((side * zoom,) * 2, Image.Resampling.NEAREST), (column * side * zoom, row * side * zoom)
        )
    _write(grid, target)


def _thumbnail(files: FileList, place: int) -> Image.Image:
    with Image.open(io.BytesIO(read_image(files, place))) as image:
        image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return ImageOps.fit(upright.convert("RGB"), (THUMBNAIL - 2, THUMBNAIL - 2))


def _write(picture: Image.Image, target: Path) -> None:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_atomically(target, buffer.getvalue(), durable=False)
