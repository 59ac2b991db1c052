"""How Pillow decodes an image to the pixels that training sees: for resized copies, serving, and what DALI cannot read.

No torch and no DALI.
"""

import numpy as np
from PIL import Image, ImageOps

UNLIKE = {("TIFF", "LA"), ("TIFF", "PA"), ("TIFF", "LAB"), ("JPEG2000", "YCbCr")}
"""Formats and modes that DALI and Pillow decode to different pixels."""
_SYCC = b"colr\x01\0\0\0\0\0\x12"
"""In the header of a JPEG 2000 file in YCbCr, of which Pillow says that it is RGB."""
FLOATS = ("F", "F;16", "F;32")
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def upright(image: Image.Image, channels: int) -> Image.Image:
    """An image turned as its EXIF orientation says, 8 bits, in the mode of 1 to 4 channels.

    16 bits keep their upper eight, transparency is left out and not blended, as DALI does.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert(_MODES[channels])


def why_not_read(kind: str, mode: str, content: bytes) -> str | None:
    """The reason why pixels of a mode are not taken, or None: nobody could tell which ones a deployment sees."""
    if kind == "JPEG2000" and _SYCC in content[:512]:
        mode = "YCbCr"
    if mode in FLOATS:
        return f"has {kind} pixels in floating point, whose range is not known; convert it to 8 or 16 bits"
    if (kind, mode) in UNLIKE:
        return f"is a {kind} of mode {mode}, which decoders read differently; convert it to PNG"
    return None
