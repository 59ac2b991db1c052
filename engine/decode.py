"""DALI pipelines: encoded files to training batches, to evaluation images, to image sizes; and which file broke one.

A pipeline reads paths that a Python callback hands over batch by batch; reading, decoding and everything
after runs in DALI's threads, or on the GPU from the decoder on.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia.dali
import torch
from nvidia.dali.pipeline import DataNode, Pipeline

from engine.data import DataConfig
from engine.errors import UserError
from engine.image_files import FileList

MAX_THREADS = 16
BATCH = 64
fn: Any = nvidia.dali.fn  # operators are made at import, and the stubs know only some
types: Any = nvidia.dali.types

PathBytes = npt.NDArray[np.uint8]
Batch = tuple[list[PathBytes] | npt.NDArray[np.generic], ...]


def thread_count(config: DataConfig) -> int:
    """Configured threads, else this process's share of the cores that it may use."""
    if config.threads:
        return config.threads
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def path_bytes(path: str) -> PathBytes:
    """A path as the pipeline takes it."""
    return np.frombuffer(os.fsencode(path), np.uint8)


def train_pipeline(
    config: DataConfig,
    source: Callable[[], Batch],
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    exact_size: bool,
) -> Pipeline:
    """`source()` gives paths, labels, mirror and, unless `augment` is none, window start and window shape.

    Outputs are images [N, H, W, 3] and labels [N]. Images are normalised, fp16 for `dtype` fp16 (and bf16 on
    a GPU, which DALI lacks), else fp32. `exact_size` says that every image has the training resolution
    already.
    """
    gpu = device.type == "cuda"
    half = dtype == torch.float16 or (gpu and dtype == torch.bfloat16)
    size = (config.resolution, config.resolution)

    def graph() -> tuple[DataNode, ...]:
        windows = config.augment != "none"
        path, label, mirror, *window = fn.external_source(source, num_outputs=5 if windows else 3, batch=True)
        cut = {"start": window[0], "shape": window[1], "axis_names": "HW"} if windows else {}
        encoded, decoder = _read(path), "mixed" if gpu else "cpu"
        if config.augment == "resized-crop":
            image = fn.decoders.image_slice(encoded, **cut, device=decoder, output_type=types.RGB)
            image = fn.resize(image, size=size, antialias=True)
        elif exact_size:
            image = fn.decoders.image(encoded, device=decoder, output_type=types.RGB)
        else:
            image = _evaluation_transform(encoded, config, decoder)
        if config.augment == "pad-crop":
            image = fn.slice(image, **cut, out_of_bounds_policy="pad", fill_values=0)
        image = fn.crop_mirror_normalize(
            image,
            mirror=mirror,
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
            dtype=types.FLOAT16 if half else types.FLOAT,
            output_layout="HWC",
        )
        return image, label.gpu() if gpu else label

    return _build(graph, batch_size, threads=thread_count(config), prefetch=config.prefetch, device=device)


def decode_images(files: FileList, config: DataConfig) -> Iterator[npt.NDArray[np.uint8]]:
    """All files in order by the evaluation transform, in batches [N, H, W, 3].

    Always on the CPU, so that the same files give the same pixels on every machine.
    """
    return _each_batch(files, config, lambda encoded: _evaluation_transform(encoded, config))


def read_shapes(files: FileList, config: DataConfig) -> Iterator[npt.NDArray[np.int64]]:
    """Height, width and channels of all files in order from their headers, in batches [N, 3]."""
    return _each_batch(files, config, fn.peek_image_shape)


def undecodable_file(paths: Sequence[str], error: Exception) -> Exception:
    """What to raise when a pipeline over `paths` failed: a UserError that names the first broken file.

    A failed pipeline is dead and does not say which file it was, so each is decoded alone until one fails. When all
    decode, `error` itself is returned.
    """
    remaining = iter(paths)
    current = ""

    def source() -> Batch:
        nonlocal current
        current = next(remaining)
        return ([path_bytes(current)],)

    def graph() -> tuple[DataNode, ...]:
        return (fn.decoders.image(_read(_paths(source)), output_type=types.RGB),)

    alone = _build(graph, 1, threads=1, prefetch=1)
    for _ in paths:
        try:
            alone.run()
        except RuntimeError:
            return UserError(f"image {current} {_fault(current)}; remove or replace it")
    return error


def _each_batch(
    files: FileList, config: DataConfig, operation: Callable[[DataNode], DataNode]
) -> Iterator[npt.NDArray[Any]]:
    """One pass over the files, in order. Raises UserError that names a file that cannot be decoded."""
    paths = files.paths
    batches = [paths[first : first + BATCH] for first in range(0, len(paths), BATCH)]
    fed = iter(batches)

    def source() -> Batch:
        return ([path_bytes(path) for path in next(fed)],)

    def graph() -> tuple[DataNode, ...]:
        return (operation(_read(_paths(source))),)

    pipeline = _build(graph, BATCH, threads=thread_count(config), prefetch=config.prefetch)
    for index in range(len(batches)):
        try:
            (output,) = pipeline.run()
        except RuntimeError as error:
            ahead = batches[index : index + config.prefetch + 1]
            raise undecodable_file([path for batch in ahead for path in batch], error) from None
        yield np.array(output.as_tensor())


def _fault(path: str) -> str:
    try:
        with open(path, "rb") as handle:
            return "is damaged or not an image" if handle.read(1) else "is empty"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _paths(source: Callable[[], Batch]) -> DataNode:
    return fn.external_source(source, num_outputs=1, batch=True)[0]


def _read(path: DataNode) -> DataNode:
    return fn.io.file.read(path, dont_use_mmap=True)  # mapping costs 10 us a file more than reading, at 500 bytes


def _evaluation_transform(encoded: DataNode, config: DataConfig, device: str = "cpu") -> DataNode:
    """Decode, then an exact resize, or torchvision's Resize and CenterCrop with its rounding, to the pixel."""
    image = fn.decoders.image(encoded, device=device, output_type=types.RGB)
    size = (config.resolution, config.resolution)
    if config.resize is None:
        return fn.resize(image, size=size, antialias=True)
    shape = fn.peek_image_shape(encoded)[0:2]
    resized = shape * config.resize // nvidia.dali.math.min(shape[0], shape[1])
    margin = resized - config.resolution
    half = margin // 2
    start = half + (margin - 2 * half) * (half - half // 2 * 2)  # round(margin / 2), halves to even
    image = fn.resize(image, size=fn.cast(resized, dtype=types.FLOAT), antialias=True)
    return fn.slice(image, start=fn.cast(start, dtype=types.INT32), shape=size, axis_names="HW")


def _build(
    graph: Callable[[], tuple[DataNode, ...]],
    batch_size: int,
    *,
    threads: int,
    prefetch: int,
    device: torch.device | None = None,
) -> Pipeline:
    device_id = (device.index or 0) if device and device.type == "cuda" else None
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=prefetch)
    with pipeline:
        pipeline.set_outputs(*graph())
    pipeline.build()
    return pipeline
