"""DALI pipelines: encoded images to evaluation images; the parts that all pipelines share; and which image broke one.

A Python callback hands over images batch by batch: their paths, which DALI reads, or their content where files hold
several. Decoding and everything after runs in DALI's threads, or on the GPU from the decoder on.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali
import torch
from nvidia.dali.pipeline import DataNode, Pipeline, pipeline_def

from bsnas.engine.data.checking.image_check import output_type
from bsnas.engine.data.contents import read_ranges, unchanged_paths
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.launcher import cores

MAX_THREADS = 16
BATCH = 64
JPEG = {"jpeg_fancy_upsampling": True}
"""Options of all decoders: the GPU interpolates chroma as libjpeg-turbo does, so that a network sees the pixels in
training that it is scored on, which always come from the CPU."""
fn: Any = nvidia.dali.fn  # operators are made at import, and the stubs know only some
types: Any = nvidia.dali.types

Encoded = npt.NDArray[np.uint8]
Batch = tuple[list[Encoded] | npt.NDArray[np.generic], ...]


def thread_count(config: DataConfig) -> int:
    """Configured threads, else this process's share of the cores that it may use."""
    if config.threads:
        return config.threads
    return min(MAX_THREADS, cores())


def prefetch_depth(config: DataConfig, device: torch.device) -> int:
    """Configured batches, else two on a CPU, whose cores training needs itself, and three on a GPU."""
    return config.prefetch or (3 if device.type == "cuda" else 2)


def handed_over(files: FileList, places: Sequence[int]) -> list[Encoded] | Encoded:
    """Images at `places` as a pipeline takes them: paths as bytes, or contents where files hold several images.

    Paths are one array [N, length], shorter ones ended by zeros as file names are: DALI looks at each array of a list,
    which doubles what it takes to feed 64 of them (0.7 ms against 0.3).
    """
    if files.offsets is not None:
        return read_ranges(files, places)
    paths = np.array(unchanged_paths(files, places))
    return paths.view(np.uint8).reshape(len(places), -1)


def encoded(node: DataNode, files: FileList) -> DataNode:
    """What `handed_over` gave, as encoded images."""
    if files.offsets is not None:
        return node
    return fn.io.file.read(node, dont_use_mmap=True)  # mapping costs 10 us a file more than reading, at 500 bytes


def decode_images(files: FileList, config: DataConfig) -> Iterator[npt.NDArray[np.uint8]]:
    """All images in order by the evaluation transform, in batches [N, H, W, channels].

    Always on the CPU, so that the same files give the same pixels on every machine. Raises UserError that names an
    image that cannot be decoded.
    """
    batches = [range(first, min(first + BATCH, len(files))) for first in range(0, len(files), BATCH)]
    fed = iter(batches)

    def graph() -> tuple[DataNode, ...]:
        (given,) = fn.external_source(lambda: (handed_over(files, next(fed)),), num_outputs=1, batch=True)
        return (evaluation_transform(encoded(given, files), config),)

    prefetch = prefetch_depth(config, torch.device("cpu"))
    pipeline = build(graph, BATCH, threads=thread_count(config), prefetch=prefetch)
    for index in range(len(batches)):
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            ahead = [place for batch in batches[index : index + prefetch + 1] for place in batch]
            raise undecodable_image(files, ahead, config, error) from None
        yield np.array(output.as_tensor())


def evaluation_transform(image: DataNode, config: DataConfig, device: str = "cpu") -> DataNode:
    """Decode, then an exact resize, or torchvision's Resize and CenterCrop with its rounding, to the pixel."""
    decoded = fn.decoders.image(image, device=device, output_type=output_type(config.channels), **JPEG)
    size = (config.resolution, config.resolution)
    if config.resize is None:
        return fn.resize(decoded, size=size, antialias=True)
    shape = fn.peek_image_shape(image)[0:2]
    resized = shape * config.resize // nvidia.dali.math.min(shape[0], shape[1])
    margin = resized - config.resolution
    half = margin // 2
    start = half + (margin - 2 * half) * (half - half // 2 * 2)  # round(margin / 2), halves to even
    decoded = fn.resize(decoded, size=fn.cast(resized, dtype=types.FLOAT), antialias=True)
    return fn.slice(decoded, start=fn.cast(start, dtype=types.INT32), shape=size, axis_names="HW")


def undecodable_image(files: FileList, places: Sequence[int], config: DataConfig, error: Exception) -> Exception:
    """What to raise when a pipeline over `places` failed: a UserError that names the first broken image.

    A failed pipeline is dead and does not say which image it was, so each is decoded alone until one fails. When all
    decode, `error` itself is returned.
    """
    remaining = iter(places)
    current = 0

    def source() -> Batch:
        nonlocal current
        current = next(remaining)
        return (handed_over(files, [current]),)

    def graph() -> tuple[DataNode, ...]:
        (given,) = fn.external_source(source, num_outputs=1, batch=True)
        return (fn.decoders.image(encoded(given, files), output_type=output_type(config.channels)),)

    alone = build(graph, 1, threads=1, prefetch=1)
    for _ in places:
        try:
            alone.run()
        except RuntimeError:
            return UserError(f"image {files.describe(current)} is damaged or not an image; remove or replace it")
    return error


def build(
    graph: Callable[[], tuple[DataNode, ...]],
    batch_size: int,
    *,
    threads: int,
    prefetch: int,
    device: torch.device | None = None,
    conditionals: bool = False,
) -> Pipeline:
    """A pipeline of the nodes that `graph` makes; `conditionals` lets it choose per image by `if`."""
    device_id = (device.index or 0) if device and device.type == "cuda" else None
    defined = pipeline_def(enable_conditionals=conditionals)(graph)
    pipeline = defined(batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch)
    pipeline.build()
    return pipeline
