"""Images that a prepared data set keeps itself: taken out of archives, or resized copies."""

import hashlib
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from bsnas.engine.data.checking.image_check import read_header
from bsnas.engine.data.checking.outcomes import Fault, ImageFacts, Outcome
from bsnas.engine.data.file_list import JPEG_SUFFIXES
from bsnas.engine.data.pillow_image import upright
from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError

IMAGES = "images"
LONGEST = 200
"""Bytes of a file's name."""


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """A resized copy; images that are small enough already are kept as they are."""

    shorter: int
    """Pixels of the shorter side."""
    quality: int
    """JPEG quality."""
    channels: int
    """1 or 3."""

    def __post_init__(self) -> None:
        if self.shorter < 1 or not 1 <= self.quality <= 100 or self.channels not in (1, 3):
            raise UserError(
                f"resize {self.shorter}, quality {self.quality}, channels {self.channels}: need at least 1 pixel, a "
                "quality from 1 to 100, and 1 or 3 channels"
            )

    @property
    def stamp(self) -> str:
        return f"{self.shorter}q{self.quality}c{self.channels}"


def stored_name(part: str, name: str, resizing: Resizing | None) -> str:
    """Where a kept image CLASS/NAME lies, relative to the prepared directory."""
    directory, base = os.path.split(name)
    suffix = os.path.splitext(base)[1].lower()
    if resizing is not None and suffix not in JPEG_SUFFIXES:
        base = f"{base}.jpg"
    if len(os.fsencode(base)) > LONGEST:  # a temporary file has some characters more, and 255 bytes are the most
        digest = hashlib.sha256(os.fsencode(base)).hexdigest()[:12]
        stem, suffix = os.path.splitext(base)
        base = f"{os.fsencode(stem)[: LONGEST - 40].decode(errors='ignore')}~{digest}{suffix[:20]}"
    return "/".join(filter(None, (IMAGES, part if part != "all" else "", directory, base)))


def write_image(content: bytes, facts: ImageFacts, target: Path, resizing: Resizing | None, max_pixels: int) -> Outcome:
    """Write an image, resized where asked; its facts as written."""
    if resizing is not None and (facts.kind != "JPEG" or min(facts.height, facts.width) > resizing.shorter):
        try:
            content = _resized(content, resizing)
        except Exception as error:  # Pillow's decoders raise all kinds for damaged images
            return Fault(f"cannot be resized ({type(error).__name__}: {error})")
        described = read_header(content, max_pixels)
        assert isinstance(described, ImageFacts)  # it was written a moment ago
        facts = replace(described, kind="JPEG")
    write_atomically(target, content, durable=False)
    return facts


def _resized(content: bytes, resizing: Resizing) -> bytes:
    mode = "L" if resizing.channels == 1 else "RGB"
    with Image.open(io.BytesIO(content)) as image:
        scale = resizing.shorter / min(image.size)
        if scale < 0.5:  # decode JPEGs at a half, a quarter or an eighth, still twice as large as what is wanted
            image.draft(mode, (int(2 * scale * image.width), int(2 * scale * image.height)))
        flat = upright(image, resizing.channels)
    if scale < 1:
        longer = round(max(flat.size) * resizing.shorter / min(flat.size))
        size = (resizing.shorter, longer) if flat.width <= flat.height else (longer, resizing.shorter)
        flat = flat.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=resizing.quality)
    return buffer.getvalue()
