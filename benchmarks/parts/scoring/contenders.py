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
from bsnas.engine.evaluation.folded import plan_of, sliced_weights
from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.networks.supernet import Supernet, classify
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.plan import Conv
from bsnas.kernels import Block
from bsnas.kernels.plan import LayerPlan, run

BATCH = 64


class EagerBlock(nn.Module):
    """A block of standard modules, its convolutions with copies of what they use."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.plan = plan_of(block)
        parts = zip(self.plan.convs, sliced_weights(block), block.norms, strict=True)
        after_sum = self.plan.layers[-1] if self.plan.shortcut and self.plan.layers else None
        self.layers = nn.ModuleList(
            nn.Sequential(
                _conv(layer, weight), copy.deepcopy(norm),
                nn.Identity() if layer is after_sum else _activation(layer.activation),
            )
            for layer, weight, norm in parts
        )  # fmt: skip
        self.activation = _activation(after_sum.activation if after_sum else None)

    def forward(self, x: Tensor) -> Tensor:
        def layer(index: int, each: LayerPlan, y: Tensor, residual: Tensor | None) -> Tensor:
            y = self.layers[index](y)
            return y if residual is None else self.activation(residual + y)

        return run(self.plan, x, layer)


def _activation(name: str | None) -> nn.Module:
    return {None: nn.Identity(), "relu6": nn.ReLU6(inplace=True), "relu": nn.ReLU(inplace=True)}[name]


def _conv(layer: Conv, weight: Tensor) -> nn.Conv2d:
    conv = nn.Conv2d(
        layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.kernel // 2,
        groups=layer.inputs if layer.depthwise else 1, bias=False, device="meta",
    )  # fmt: skip
    weight = weight[:, :, None, None] if weight.dim() == 2 else weight
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    return conv


class EagerPath(nn.Module):
    """One path through a supernet as a plain network with a copy of everything that it uses."""

    def __init__(self, supernet: Supernet, arch: Arch) -> None:
        super().__init__()
        self.layers = nn.Sequential(*map(EagerBlock, supernet.path_blocks(arch)))
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
