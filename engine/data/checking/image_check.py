"""Does every image decode? Each is read and decoded once by the decoder that training uses, and described.

An image that does not decode kills a DALI pipeline for good, so whatever enters a data set passes here first. What
fails gets a reason instead of a description. Nothing is decoded whose header names more pixels than are allowed.
"""

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import nvidia.dali
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from bsnas.engine.data.checking.outcomes import Fault, ImageFacts, Outcome
from bsnas.engine.data.pillow_image import upright, why_not_read

BATCH = 64
BATCH_PIXELS = 64_000_000
"""Most pixels that are decoded at once, unless one image has more."""
MAX_MEGAPIXELS = 100
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")
BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"\0\0\0\x0cjP": "JPEG2000", b"BM": "BMP",
}  # fmt: skip
CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "PA": 4, "RGBA": 4, "RGBX": 4, "CMYK": 4}

fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Key = TypeVar("Key")
Checked = tuple[Key, bytes, Outcome]


def output_type(channels: int) -> Any:
    """How DALI is to convert: to gray or to RGB; any other number of channels must be in the file."""
    return {1: types.GRAY, 3: types.RGB}.get(channels, types.ANY_DATA)


@dataclass(frozen=True)
class _Described:
    """An image before it is decoded."""

    content: bytes
    header: Outcome
    whole: bool


class ImageChecker(Generic[Key]):
    """Decodes images in batches; one that fails is told from the others. Use it as a context.

    `add` takes an image and gives those that are done by now, in the order in which they came; `rest` gives the others:
    each with its key, content and outcome.
    """

    def __init__(
        self, *, channels: int = 3, threads: int, max_megapixels: int = MAX_MEGAPIXELS, reencoded: bool = False
    ) -> None:
        """`channels` is what training asks for. `reencoded`: what Pillow alone reads will be written anew."""
        self._reencoded = reencoded
        self._channels, self._threads, self._max_pixels = channels, threads, max_megapixels * 1_000_000
        self._readers = ThreadPoolExecutor(max(2, threads))
        self._reading: deque[tuple[Key, Future[_Described]]] = deque()
        self._together: Pipeline | None = None
        self._alone: dict[Callable[[Any], Any], Pipeline] = {}
        """For one image, by what is done with it."""
        self._fed: list[np.ndarray] = []

    def __enter__(self) -> "ImageChecker[Key]":
        return self

    def __exit__(self, *_: object) -> None:
        self._readers.shutdown()

    def add(self, key: Key, load: Callable[[], bytes]) -> list[Checked[Key]]:
        """`load` runs in a thread and may raise OSError."""
        self._reading.append((key, self._readers.submit(self._describe, load)))
        # A batch is decoded when the next one is being read.
        return self._decode_batch() if len(self._reading) == 2 * BATCH else []

    def rest(self) -> list[Checked[Key]]:
        return [*self._decode_batch(), *self._decode_batch()]

    def _describe(self, load: Callable[[], bytes]) -> _Described:
        try:
            content = load()
        except OSError as error:
            return _Described(b"", Fault(f"cannot be read ({error.strerror or error})"), whole=False)
        header = read_header(content, self._max_pixels)
        return _Described(content, header, whole=isinstance(header, ImageFacts) and looks_whole(content, header.kind))

    def _decode_batch(self) -> list[Checked[Key]]:
        """Decode what has a header of the first images being read: whole ones together, the others one by one."""
        first = [self._reading.popleft() for _ in range(min(BATCH, len(self._reading)))]
        batch = [(key, reading.result()) for key, reading in first]
        outcomes: list[Outcome] = [described.header for _, described in batch]
        together = []
        for place, (_, described) in enumerate(batch):
            if isinstance(described.header, ImageFacts):
                if described.whole and self._parses(described.content):
                    together.append((place, described.header))
                else:
                    shape = self._shape_alone(np.frombuffer(described.content, np.uint8))
                    outcomes[place] = self._with_shape(described.content, described.header, shape)
        while together:
            pixels = np.cumsum([facts.height * facts.width for _, facts in together])
            count = max(1, int((pixels <= BATCH_PIXELS).sum()))
            chosen, together = together[:count], together[count:]
            shapes = self._shapes([batch[place][1].content for place, _ in chosen])
            for (place, facts), shape in zip(chosen, shapes, strict=True):
                outcomes[place] = self._with_shape(batch[place][1].content, facts, shape)
        return [(key, described.content, outcome) for (key, described), outcome in zip(batch, outcomes, strict=True)]

    def _refused(self, content: bytes, facts: ImageFacts) -> Outcome:
        """What to say of an image that the decoder does not take: whether it is damaged, Pillow tells."""
        about = f"({facts.kind}, {facts.width}x{facts.height}, {facts.size} bytes)"
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = upright(image, self._channels) if self._channels in (1, 3) else image.copy()
        except Exception:  # Pillow's readers of damaged images raise all kinds
            return Fault(f"is damaged or cut off {about}")
        if self._reencoded and self._channels in (1, 3):
            return replace(facts, height=pixels.height, width=pixels.width, kind=f"{facts.kind} that is re-encoded")
        return Fault(
            f"is not read by the decoder, though by others {about}; convert it to JPEG or PNG, or use --resize"
        )

    def _with_shape(self, content: bytes, facts: ImageFacts, shape: tuple[int, ...] | None) -> Outcome:
        if shape is None:
            return self._refused(content, facts)
        if shape[2] != self._channels:
            return Fault(f"has {shape[2]} channels, where the data set has {self._channels}")
        return ImageFacts(
            size=facts.size, height=shape[0], width=shape[1], channels=facts.channels, kind=facts.kind,
            digest=facts.digest,
        )  # fmt: skip

    def _parses(self, content: bytes) -> bool:
        """Whether the decoder reads the header, asked alone: two that it does not read have ended the process when they
        were in one batch (DALI 2.4)."""
        return self._shape_alone(np.frombuffer(content, np.uint8), fn.peek_image_shape) is not None

    def _shapes(self, contents: list[bytes]) -> list[tuple[int, ...] | None]:
        """Decoded height, width and channels of each; None for one that does not decode."""
        self._fed = [np.frombuffer(content, np.uint8) for content in contents]
        if len(contents) == 1:
            return [self._shape_alone(self._fed[0])]
        try:
            self._together = self._together or self._build(BATCH, self._threads, self._decode)
            return [tuple(shape) for shape in self._together.run()[0].shape()]
        except RuntimeError:
            self._together = None  # a failed pipeline is dead
            return [self._shape_alone(content) for content in list(self._fed)]

    def _shape_alone(
        self, content: np.ndarray, operation: Callable[[Any], Any] | None = None
    ) -> tuple[int, ...] | None:
        """The shape of what an operation, by default the decoder, gives for an image; None where it refuses it."""
        operation = operation or self._decode
        self._fed = [content]
        try:
            if operation not in self._alone:
                self._alone[operation] = self._build(1, 1, operation)
            return tuple(self._alone[operation].run()[0].shape()[0])
        except RuntimeError:
            self._alone.pop(operation, None)  # a failed pipeline is dead
            return None

    def _decode(self, encoded: Any) -> Any:
        return fn.decoders.image(encoded, output_type=output_type(self._channels))

    def _build(self, batch: int, threads: int, operation: Callable[[Any], Any]) -> Pipeline:
        pipeline = Pipeline(batch, threads, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
        with pipeline:
            encoded = fn.external_source(lambda: self._fed, batch=True)
            pipeline.set_outputs(operation(encoded))
        pipeline.build()
        return pipeline


def read_header(content: bytes, max_pixels: int) -> Outcome:
    """What the header of an encoded image says; nothing is decoded."""
    if not content:
        return Fault("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images: the limit below decides
            with Image.open(io.BytesIO(content)) as image:
                kind, mode, (width, height) = image.format or "", image.mode, image.size
    except Image.DecompressionBombError:
        return Fault(f"has more pixels than are allowed ({max_pixels // 1_000_000} million)")
    except Exception:  # Pillow's readers of damaged headers raise all kinds
        begun = next((name for start, name in BEGINNINGS.items() if content.startswith(start)), None)
        more = f", as a {begun} that is damaged or cut off" if begun else ""
        return Fault(f"is no image (it begins with {content[:8]!r}{more})")
    if kind not in FORMATS:
        return Fault(f"is a {kind} file, which the decoder does not read; convert it to JPEG or PNG")
    if reason := why_not_read(kind, mode, content):
        return Fault(reason)
    if width * height > max_pixels:
        return Fault(
            f"has more pixels than are allowed ({width}x{height}, where {max_pixels // 1_000_000} million are)"
        )
    return ImageFacts(
        size=len(content), height=height, width=width, kind=kind, channels=1 if mode.startswith("I") else
        CHANNELS.get(mode, 3), digest=hashlib.sha256(content).hexdigest()[:32],
    )  # fmt: skip


def looks_whole(content: bytes, kind: str) -> bool:
    """Whether an image may be decoded in one batch with others, found without DALI.

    DALI 2.4 has ended with a segmentation fault on batches with several images that it refuses, so only a JPEG of the
    usual kind with its end, and a PNG with correct checksums, are decoded together. Others, which are rare, come alone.
    """
    if kind in ("JPEG", "MPO"):
        return content.rstrip(b"\0").endswith(b"\xff\xd9") and _is_usual_jpeg(content)
    if kind != "PNG":
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
    except Exception:  # Pillow's readers of damaged images raise all kinds
        return False
    return True


def _is_usual_jpeg(content: bytes) -> bool:
    """Baseline or progressive, Huffman-coded, 8 bits, one or three components: by the marker of its frame."""
    place = 2
    while place + 9 < len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker <= 0xC2 and content[place + 4] == 8 and content[place + 9] in (1, 3)
        elif length < 2:
            return False
        else:
            place += 2 + length
    return False
