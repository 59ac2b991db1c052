"""The images of an evaluation in the order in which they are visited, on the device that scores them."""

import random
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

UPLOAD_BYTES = 64 << 20
"""Most of a set that lies in host memory while it is copied to a device."""


class Images(Protocol):
    """What the evaluator needs of an evaluation set (engine/data/loading/evaluation_set.py)."""

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, H, W, C]."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the channels, in units of 0 to 1."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Of the channels, in units of 0 to 1."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of images, labels and normalisation."""
        ...


def visiting_order(images: int) -> list[int]:
    """The order in which an evaluation visits images: random, and always the same.

    Data sets list their images class by class. A part of the images stands for all of them (early decisions), and a
    batch of them for the data (recalibration), in a random order only.
    """
    order = list(range(images))
    random.Random(0).shuffle(order)
    return order


def uploaded(images: np.ndarray, device: torch.device) -> Tensor:
    """Images on a device. Host memory holds a slice at a time: each process of a machine has a set of its own there
    (7.5 GB for ImageNet's 50,000 images at 224x224), and all of them map one file."""
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    count = max(1, UPLOAD_BYTES * len(images) // images.nbytes)
    for start in range(0, len(images), count):
        resident[start : start + count].copy_(torch.from_numpy(np.array(images[start : start + count])))
    return resident


class ScoredImages:
    """Images and labels in visiting order. Kept on a GPU as uint8 when they fit into `resident_bytes` there."""

    def __init__(self, data: Images, device: torch.device, resident_bytes: int) -> None:
        order = np.array(visiting_order(len(data.labels)), np.int64)
        self.resolution = int(data.images.shape[1])
        self.labels = torch.from_numpy(np.asarray(data.labels, np.int64)[order]).to(device)
        """int64 [N] on the device."""
        self._order = order
        self._images = data.images
        self._device = device
        self._shift = torch.tensor(data.mean, device=device) * 255
        self._scale = 1 / (torch.tensor(data.std, device=device) * 255)
        self._resident: Tensor | None = None
        if device.type != "cpu" and data.images.nbytes <= resident_bytes:
            self._resident = uploaded(data.images, device)

    def __len__(self) -> int:
        return len(self._order)

    def normalized(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The images visited as start..stop-1: [n, C, H, W], channels_last, normalised."""
        chosen = self._order[start:stop]
        if self._resident is not None:
            raw = self._resident[torch.from_numpy(chosen).to(self._device)]
        else:
            raw = torch.from_numpy(self._images[chosen]).to(self._device)
        return ((raw.float() - self._shift) * self._scale).to(dtype).permute(0, 3, 1, 2)
