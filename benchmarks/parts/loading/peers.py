"""Loaders of other projects that read formats of their own: webdataset and ffcv, over the same images."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from bsnas.benchmarks.parts.loading.contenders import Contender, transforms
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.atomic import build_directory

SHARD_BYTES = 8_000_000
"""Small, so that a few hundred images make more shards than there are workers."""
SHUFFLED = 512
"""Samples in webdataset's shuffle buffer."""


def why_missing(name: str) -> str | None:
    """Why a contender cannot run here; None when it can."""
    if name == "webdataset" and importlib.util.find_spec("webdataset") is None:
        return "webdataset is not installed (pip install webdataset)"
    if name == "ffcv" and importlib.util.find_spec("ffcv") is None:
        return "ffcv is not installed (pip install ffcv, which needs the headers of OpenCV and libturbojpeg)"
    return None


def webdataset_shards(files: FileList, config: DataConfig) -> Path:
    """The images as shards, made once; in a process that forks no workers, since this loads DALI."""

    def build(work: Path) -> None:
        from bsnas.engine.data.preparing.shard_writer import write_shards

        classes = [str(label) for label in range(int(files.labels.max()) + 1)]
        write_shards(work, "train", files, classes, SHARD_BYTES, threads=2)

    return build_directory(_shards(files, config), build)


def _shards(files: FileList, config: DataConfig) -> Path:
    return config.cache / "benchmark" / f"webdataset-{files.identity[:12]}"


def webdataset(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """WebDataset shards decoded with PIL in DataLoader workers, as its documentation has it for ImageNet."""
    import webdataset as wds

    shards = sorted(str(path) for path in (_shards(files, config) / "shards").glob("*.tar"))
    transform = transforms(config)
    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node)
        .shuffle(SHUFFLED)
        .decode("pilrgb")
        .to_tuple("jpg;jpeg;png", "cls")
        .map_tuple(transform, int)
        .batched(batch_size, partial=False)
    )
    stream = iter(DataLoader(dataset, batch_size=None, num_workers=config.threads, multiprocessing_context="fork"))
    workers = [worker.pid for worker in stream._workers]  # type: ignore[attr-defined]
    return Contender((images for images, _ in stream), workers)


def ffcv(files: FileList, config: DataConfig, batch_size: int) -> Contender:
    """ffcv's own format with the JPEGs as they are, its compiled decoder and crop."""
    import numpy as np
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter
    from PIL import Image

    class Images:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, place: int) -> tuple[Any, int]:
            return np.asarray(Image.open(files.path(place)).convert("RGB")), int(files.labels[place])

    def build(work: Path) -> None:
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=94), "label": IntField()}
        DatasetWriter(str(work / "train.beton"), fields, num_workers=config.threads).from_indexed_dataset(Images())

    directory = build_directory(config.cache / "benchmark" / f"ffcv-{files.identity[:12]}", build)
    size = (config.resolution, config.resolution)
    decoder = (
        RandomResizedCropRGBImageDecoder(size, scale=config.crop_scale)
        if config.augment == "resized-crop"
        else SimpleRGBImageDecoder()
    )
    mean, std = (np.array(values) * 255 for values in config.scale)
    pipeline = [decoder, *([RandomHorizontalFlip()] if config.flip else [])]
    pipeline += [NormalizeImage(mean, std, np.float32), ToTensor(), ToTorchImage()]
    loader = Loader(
        str(directory / "train.beton"),
        batch_size=batch_size,
        num_workers=config.threads,
        order=OrderOption.RANDOM,
        pipelines={"image": pipeline, "label": [IntDecoder(), ToTensor()]},
    )

    def batches() -> Iterator[torch.Tensor]:
        while True:
            yield from (images for images, _ in loader)

    return Contender(batches())
