"""Images that score networks: decoded once, kept as one memory-mapped uint8 array that all processes share."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.decode import decode_images
from bsnas.engine.host.atomic import build_directory
from bsnas.engine.host.errors import UserError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Decoded, resized and cropped images with their labels."""

    images: npt.NDArray[np.uint8]
    """[N, H, W, C], read-only, memory-mapped from the cache directory."""
    labels: npt.NDArray[np.int64]
    mean: tuple[float, ...]
    """Of each channel, in units of 0 to 1."""
    std: tuple[float, ...]
    fingerprint: str
    """Hash of the files, their order, labels and the transform, normalisation included."""

    def __len__(self) -> int:
        return len(self.labels)

    def normalized(
        self, device: torch.device | str, dtype: torch.dtype = torch.float32, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Images start to stop, normalised: [N, C, H, W], channels_last, `dtype`, on `device`."""
        chosen = torch.from_numpy(np.array(self.images[start:stop]))
        return normalize(chosen.to(device), self.mean, self.std, dtype)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8 [N, H, W, C] to normalised [N, C, H, W] in channels_last, on the device that holds the images."""
    shift = torch.tensor(mean, device=images.device) * 255
    scale = 1 / (torch.tensor(std, device=images.device) * 255)
    return ((images.float() - shift) * scale).to(dtype).permute(0, 3, 1, 2)


def evaluation_set(files: FileList, config: DataConfig) -> EvaluationSet:
    """The decoded images of a list of files; from the cache where the same files went through the same transform.

    The first process decodes and the others wait for it. Raises UserError that names a file that cannot be
    decoded.
    """
    transform = {
        "format": FORMAT,
        "resolution": config.resolution,
        "resize": config.resize,
        "channels": config.channels,
    }
    identity = hashlib.sha256(f"{files.identity}{json.dumps(transform)}".encode()).hexdigest()
    directory = config.cache / "evaluation" / identity[:32]
    build_directory(directory, lambda work: _decode(files, config, work))
    images = np.load(directory / "images.npy", mmap_mode="r")
    mean, std = config.scale
    scale = json.dumps([identity, mean, std])
    return EvaluationSet(
        images=images,
        labels=files.labels,
        mean=mean,
        std=std,
        fingerprint=hashlib.sha256(scale.encode()).hexdigest(),
    )


def _decode(files: FileList, config: DataConfig, work: Path) -> None:
    shape = (len(files), config.resolution, config.resolution, config.channels)
    needed, free = int(np.prod(shape)), shutil.disk_usage(work).free
    if needed > free:
        raise UserError(
            f"decoding {len(files)} images takes {needed / 1e9:.1f} GB in {work.parent}, "
            f"which has {free / 1e9:.1f} GB free; free some or set cache_dir"
        )
    images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, shape)
    first = 0
    for batch in decode_images(files, config):
        images[first : first + len(batch)] = batch
        first += len(batch)
    images.flush()
