"""Scoring subnets one after another, as others do it: what the batched evaluator is compared with.

Both contenders run a plain eager network per subnet, built of contiguous weights before the clock starts (slices of
a supernet would only make them slower).
"""

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bsnas.benchmarks.parts.scoring.case import ImageArrays
from bsnas.engine.evaluation.folded import plan_of
from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.networks.subnet import PlannedBlock, inherit
from bsnas.engine.networks.supernet import Supernet, classify
from bsnas.engine.space.arch import Arch
from bsnas.kernels import Block

BATCH = 64


class EagerBlock(PlannedBlock):
    """A block of a supernet with a copy of everything that it uses; standard modules in training too."""

    def __init__(self, block: Block) -> None:
        super().__init__(plan_of(block))
        with torch.no_grad():
            inherit(self, block)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class EagerPath(nn.Module):
    """One path through a supernet as a plain network with a copy of everything that it uses."""

    def __init__(self, supernet: Supernet, arch: Arch) -> None:
        super().__init__()
        blocks = nn.Sequential(*map(EagerBlock, supernet.path_blocks(arch)))
        self.layers = blocks.to(supernet.classifier.weight.device)
        self.classifier = copy.deepcopy(supernet.classifier)

    def forward(self, x: Tensor) -> Tensor:
        return classify(self.layers(x), self.classifier.weight, self.classifier.bias)


class TransformedImages(Dataset):
    """One image at a time as the public systems' loaders give it: to float, normalised, [3, H, W]."""

    def __init__(self, data: ImageArrays) -> None:
        self.data = data
        self.mean = torch.tensor(data.mean).view(3, 1, 1)
        self.std = torch.tensor(data.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.data.images[index]).permute(2, 0, 1).contiguous().float().div_(255)
        return image.sub_(self.mean).div_(self.std), int(self.data.labels[index])


@torch.no_grad()
def score_through_loader(network: nn.Module, data: ImageArrays, device: torch.device) -> Tensor:
    """Contender (a): logits [N, classes] from a DataLoader in eager float32, contiguous NCHW."""
    loader = DataLoader(TransformedImages(data), batch_size=BATCH, pin_memory=device.type == "cuda")
    return torch.cat([network(images.to(device)) for images, _ in loader])


@torch.no_grad()
def score_cached(network: nn.Module, images: Tensor) -> Tensor:
    """Contender (b): logits [N, classes] from images that lie ready on the device, channels_last."""
    return torch.cat([network(batch) for batch in images.split(BATCH)])


def cached_images(data: ImageArrays, device: torch.device, dtype: torch.dtype) -> Tensor:
    """All images normalised: [N, 3, H, W], channels_last."""
    scaled = (data.images.astype(np.float32) / 255 - np.array(data.mean)) / np.array(data.std)
    return torch.from_numpy(scaled).to(device, dtype).permute(0, 3, 1, 2)


@torch.no_grad()
def recalibrate_alone(network: nn.Module, data: ImageArrays, batch: int, device: torch.device) -> None:
    """Give one subnet statistics of its own, batch by batch in train mode; through a tensor, not a loader."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    network.train()
    order = visiting_order(len(data.labels))
    images = cached_images(data, device, torch.float32)
    for start in range(0, len(order) // batch * batch, batch):
        network(images[order[start : start + batch]].contiguous())
    network.eval()
