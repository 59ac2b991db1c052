"""Scoring subnets one after another, as others do it: what the batched evaluator is compared with.

Both contenders run a plain eager network per subnet, built of contiguous weights before the clock starts (slices of
a supernet would only make them slower).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bsnas.benchmarks.parts.scoring.case import ImageArrays
from bsnas.engine.evaluation.folded import sliced_weights
from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.space import Arch
from bsnas.kernels import BlockShape

BATCH = 64


class EagerBlock(nn.Module):
    """An inverted residual block of standard modules; without `expand` a depthwise-separable one."""

    def __init__(self, weights: Sequence[Tensor | None], norms: Sequence[nn.Module | None], shape: BlockShape) -> None:
        super().__init__()
        self.residual = shape.residual
        layers: list[nn.Module] = []
        for weight, norm in zip(weights, norms, strict=True):
            if weight is None or norm is None:
                continue
            depthwise = weight.dim() == 4
            conv = _conv(weight if depthwise else weight[:, :, None, None], shape.stride if depthwise else 1, depthwise)
            layers += [conv, copy.deepcopy(norm), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y


def _conv(weight: Tensor, stride: int, depthwise: bool) -> nn.Conv2d:
    out_channels, in_channels, kernel, _ = weight.shape
    groups = out_channels if depthwise else 1
    conv = nn.Conv2d(
        in_channels * groups, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False, device="meta"
    )
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    return conv


class EagerPath(nn.Module):
    """One path through a supernet as a plain network with a copy of everything that it uses."""

    def __init__(self, supernet: Supernet, arch: Arch) -> None:
        super().__init__()
        shape = supernet.separable_shape
        blocks = [EagerBlock(sliced_weights(supernet.separable_weights, shape), supernet.separable_norms, shape)]
        shapes = supernet.block_shapes(arch)
        for i, (op, shape) in enumerate(zip(arch.operations, shapes, strict=True)):
            weights = sliced_weights(supernet.block_weights(i, op), shape)
            blocks.append(EagerBlock(weights, supernet.block_norms(i, op), shape))
        width = shapes[-1].out_channels
        self.layers = nn.Sequential(
            _conv(supernet.stem_conv.weight, supernet.space.stem_stride, depthwise=False),
            copy.deepcopy(supernet.stem_bn),
            nn.ReLU6(inplace=True),
            *blocks,
            _conv(supernet.tail_weight[:, :width, None, None], 1, depthwise=False),
            copy.deepcopy(supernet.tail_norm(width)),
            nn.ReLU6(inplace=True),
        )
        self.classifier = copy.deepcopy(supernet.classifier)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layers(x).mean((2, 3)))


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
