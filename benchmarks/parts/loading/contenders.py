"""Loaders to compare: ours, DALI's own file reader with its random operators, torchvision's DataLoader.

Each is an endless iterator of training batches with the same augmentation and output: normalised fp32 [N, 3, H, W].
DALI is imported only by those that use it: workers forked from a process with its threads crash.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image, read_file
from torchvision.transforms import v2

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList


@dataclass
class Contender:
    """A running loader."""

    batches: Iterator[Tensor]
    worker_pids: list[int] = field(default_factory=list)
    """Processes beside this one that decode."""


def ours(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """The product's loader."""
    from bsnas.engine.data.loading.loader import TrainLoader

    loader = TrainLoader(files, config, batch_size=batch_size, seed=0)

    def batches() -> Iterator[Tensor]:
        for epoch in range(10**9):
            for images, _ in loader.epoch(epoch):
                yield images

    return Contender(batches())


def bare_dali(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """The shortest DALI pipeline for the job: fn.readers.file and DALI's random operators."""
    from nvidia.dali.pipeline import Pipeline

    from bsnas.engine.data.loading.decode import fn, types

    size = (config.resolution, config.resolution)
    pipeline = Pipeline(batch_size, config.threads, None, prefetch_queue_depth=config.prefetch, seed=0)
    with pipeline:
        encoded, label = fn.readers.file(files=files.paths, labels=files.labels.tolist(), random_shuffle=True)
        if config.augment == "resized-crop":
            image = fn.decoders.image_random_crop(
                encoded, output_type=types.RGB, random_area=config.crop_scale, random_aspect_ratio=(3 / 4, 4 / 3)
            )
            if config.antialias:
                image = fn.resize(image, size=size, antialias=True)
            else:
                shape = image.shape(dtype=types.FLOAT)
                zero = shape[0] * 0.0
                ratios = (shape[1] / float(size[1]), zero, zero, zero, shape[0] / float(size[0]), zero, zero, zero)
                matrix = fn.reshape(fn.stack(*ratios, zero + 1.0), shape=[3, 3])
                image = fn.experimental.warp_perspective(image, matrix=matrix, size=size, border_mode="replicate")
        else:
            image = fn.resize(fn.decoders.image(encoded, output_type=types.RGB), size=size, antialias=True)
            start = fn.random.uniform(values=list(range(-config.pad, config.pad + 1)), shape=2, dtype=types.INT32)
            image = fn.slice(image, start=start, shape=size, axis_names="HW", out_of_bounds_policy="pad", fill_values=0)
        image = fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip() if config.flip else 0,
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )
        pipeline.set_outputs(image, label)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.from_dlpack(pipeline.run()[0].as_tensor()).permute(0, 3, 1, 2)

    return Contender(batches())


class _Files(Dataset[tuple[Tensor, int]]):
    """What torchvision's ImageFolder does, over our list of files."""

    def __init__(self, files: FileList, load: Callable[[str], object], transform: Callable[[object], Tensor]) -> None:
        self._paths, self._labels = files.paths, files.labels.tolist()
        self._load, self._transform = load, transform

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(self._load(self._paths[index])), self._labels[index]


def torchvision_pil(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """DataLoader with PIL, as torchvision's reference scripts have it."""
    from torchvision.datasets.folder import pil_loader

    return _data_loader(files, pil_loader, config, batch_size)


def torchvision_decode_jpeg(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """DataLoader with torchvision's own decoder and tensor transforms."""
    return _data_loader(files, _decode, config, batch_size)


def _decode(path: str) -> Tensor:
    return decode_image(read_file(path), ImageReadMode.RGB)


def transforms(config: DataConfig) -> Callable[[object], Tensor]:
    """The augmentation of a configuration in torchvision's transforms."""
    size = (config.resolution, config.resolution)
    crop = (
        [v2.RandomResizedCrop(size, scale=config.crop_scale, antialias=True)]
        if config.augment == "resized-crop"
        else [v2.Resize(size, antialias=True), v2.RandomCrop(size, padding=config.pad)]
    )
    flip = [v2.RandomHorizontalFlip()] if config.flip else []
    convert = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(config.mean, config.std)]
    composed: Callable[[object], Tensor] = v2.Compose([*crop, *flip, *convert])
    return composed


def _data_loader(files: FileList, load: Callable[[str], object], config: DataConfig, batch_size: int) -> Contender:
    dataset = _Files(files, load, transforms(config))
    loader = DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=config.threads,
        persistent_workers=True,
        multiprocessing_context="fork",  # Linux's default, which this process, itself spawned, does not have
    )
    first = iter(loader)

    def batches() -> Iterator[Tensor]:
        yield from (images for images, _ in first)
        while True:
            yield from (images for images, _ in loader)

    return Contender(batches(), [worker.pid for worker in first._workers])  # type: ignore[attr-defined]
