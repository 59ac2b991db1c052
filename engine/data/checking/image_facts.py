"""What is known of one image file: facts, or the reason why it cannot be used."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """A decodable image."""

    size: int
    """Bytes."""
    height: int
    width: int
    channels: int
    """Of the file, before it is converted to what training asks for."""
    kind: str
    """Name of its format, as `JPEG`, whatever its suffix says."""
    digest: str
    """First 16 bytes of its SHA-256 in hexadecimal digits."""


@dataclass(frozen=True)
class Fault:
    """Why an image cannot be used, so that `NAME REASON` reads as a sentence."""

    reason: str
