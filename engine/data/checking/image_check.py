"""Does every image decode? Each is read and decoded once by the decoder that training uses, and described.

An image that does not decode kills a DALI pipeline for good, so whatever enters a data set passes here first. What
fails gets a reason instead of a description. Nothing is decoded whose header names more pixels than are allowed.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import nvidia.dali
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from bsnas.engine.data.checking.image_facts import Fault, ImageFacts

BATCH = 64
BATCH_PIXELS = 64_000_000
"""Most pixels that are decoded at once, unless one image has more."""
MAX_FILE_BYTES = 512 * 2**20
MAX_MEGAPIXELS = 100
FORMATS = ("JPEG", "MPO", "PNG", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000")
CHANNELS = {"1": 1, "L": 1, "LA": 2, "P": 3, "PA": 4, "RGBA": 4, "RGBX": 4, "CMYK": 4}

fn: Any = nvidia.dali.fn
types: Any = nvidia.dali.types
Key = TypeVar("Key")


def output_type(channels: int) -> Any:
    """How DALI is to convert: to gray or to RGB; any other number of channels must be in the file."""
    return {1: types.GRAY, 3: types.RGB}.get(channels, types.ANY_DATA)


@dataclass(frozen=True)
class _Described:
    """An image before it is decoded."""

    content: bytes
    header: ImageFacts | Fault
    whole: bool


class ImageChecker:
    """Decodes images in batches; one that fails is told from the others."""

    def __init__(self, *, channels: int = 3, threads: int, max_megapixels: int = MAX_MEGAPIXELS) -> None:
        """`channels` is what training asks for."""
        self._channels, self._threads, self._max_pixels = channels, threads, max_megapixels * 1_000_000
        self._together: Pipeline | None = None
        self._alone: Pipeline | None = None
        self._fed: list[np.ndarray] = []

    def check(
        self, images: Iterable[tuple[Key, Callable[[], bytes]]]
    ) -> Iterator[tuple[Key, bytes, ImageFacts | Fault]]:
        """Each image's key, content and facts, in order. The callables run in threads and may raise OSError."""
        source = iter(images)
        with ThreadPoolExecutor(max(2, self._threads)) as pool:
            ahead = self._read(pool, source)
            while ahead:
                batch = [(key, reading.result()) for key, reading in ahead]
                ahead = self._read(pool, source)  # while the decoder works on the present ones
                yield from self._decode(batch)

    def _read(
        self, pool: ThreadPoolExecutor, source: Iterator[tuple[Key, Callable[[], bytes]]]
    ) -> list[tuple[Key, Future[_Described]]]:
        return [(key, pool.submit(self._describe, load)) for key, load in islice(source, BATCH)]

    def _describe(self, load: Callable[[], bytes]) -> _Described:
        try:
            content = load()
        except OSError as error:
            return _Described(b"", Fault(f"cannot be read ({error.strerror or error})"), whole=False)
        header = read_header(content, self._max_pixels)
        return _Described(content, header, whole=isinstance(header, ImageFacts) and looks_whole(content, header.kind))

    def _decode(self, batch: list[tuple[Key, _Described]]) -> Iterator[tuple[Key, bytes, ImageFacts | Fault]]:
        """Decode what has a header: whole images together, the others one by one."""
        outcomes: list[ImageFacts | Fault] = [described.header for _, described in batch]
        together = []
        for place, (_, described) in enumerate(batch):
            if isinstance(described.header, ImageFacts):
                if described.whole:
                    together.append((place, described.header))
                else:
                    shape = self._shape_alone(np.frombuffer(described.content, np.uint8))
                    outcomes[place] = self._with_shape(described.header, shape)
        while together:
            pixels = np.cumsum([facts.height * facts.width for _, facts in together])
            count = max(1, int((pixels <= BATCH_PIXELS).sum()))
            chosen, together = together[:count], together[count:]
            shapes = self._shapes([batch[place][1].content for place, _ in chosen])
            for (place, facts), shape in zip(chosen, shapes, strict=True):
                outcomes[place] = self._with_shape(facts, shape)
        for (key, described), outcome in zip(batch, outcomes, strict=True):
            yield key, described.content, outcome

    def _with_shape(self, facts: ImageFacts, shape: tuple[int, ...] | None) -> ImageFacts | Fault:
        if shape is None:
            return Fault(f"is damaged or cut off ({facts.kind}, {facts.width}x{facts.height}, {facts.size} bytes)")
        if shape[2] != self._channels:
            return Fault(f"has {shape[2]} channels, where the data set has {self._channels}")
        return ImageFacts(
            size=facts.size, height=shape[0], width=shape[1], channels=facts.channels, kind=facts.kind,
            digest=facts.digest,
        )  # fmt: skip

    def _shapes(self, contents: list[bytes]) -> list[tuple[int, ...] | None]:
        """Decoded height, width and channels of each; None for one that does not decode."""
        self._fed = [np.frombuffer(content, np.uint8) for content in contents]
        if len(contents) == 1:
            return [self._shape_alone(self._fed[0])]
        try:
            self._together = self._together or self._build(BATCH, self._threads)
            return [tuple(shape) for shape in self._together.run()[0].shape()]
        except RuntimeError:
            self._together = None  # a failed pipeline is dead
            return [self._shape_alone(content) for content in list(self._fed)]

    def _shape_alone(self, content: np.ndarray) -> tuple[int, ...] | None:
        self._fed = [content]
        try:
            self._alone = self._alone or self._build(1, 1)
            return tuple(self._alone.run()[0].shape()[0])
        except RuntimeError:
            self._alone = None
            return None

    def _build(self, batch: int, threads: int) -> Pipeline:
        pipeline = Pipeline(batch, threads, None, prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)
        with pipeline:
            encoded = fn.external_source(lambda: self._fed, batch=True)
            pipeline.set_outputs(fn.decoders.image(encoded, output_type=output_type(self._channels)))
        pipeline.build()
        return pipeline


def read_header(content: bytes, max_pixels: int) -> ImageFacts | Fault:
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
        return Fault(f"is no image (it begins with {content[:8]!r})")
    if kind not in FORMATS:
        return Fault(f"is a {kind} file, which the decoder does not read; convert it to JPEG or PNG")
    if width * height > max_pixels:
        return Fault(
            f"has more pixels than are allowed ({width}x{height}, where {max_pixels // 1_000_000} million are)"
        )
    return ImageFacts(
        size=len(content), height=height, width=width, kind=kind, channels=1 if mode.startswith("I") else
        CHANNELS.get(mode, 3), digest=hashlib.sha256(content).hexdigest()[:32],
    )  # fmt: skip


def looks_whole(content: bytes, kind: str) -> bool:
    """Whether an image is likely to decode, found without DALI.

    DALI 2.4 has ended with a segmentation fault on a batch with two images that were cut off, so doubtful ones are
    kept out of batches. A JPEG must have its end, a PNG correct checksums; other formats, which are rare, are decoded.
    """
    if kind in ("JPEG", "MPO"):
        return content.rstrip(b"\0").endswith(b"\xff\xd9")
    try:
        with Image.open(io.BytesIO(content)) as image:
            if kind == "PNG":
                image.verify()
            else:
                image.load()
    except Exception:  # Pillow's readers of damaged images raise all kinds
        return False
    return True


def read_file(path: str) -> bytes:
    """The content of a file. Raises OSError, for one that is too large as well."""
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise OSError(f"{size} bytes, more than {MAX_FILE_BYTES}")
        return handle.read()
