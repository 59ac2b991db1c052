"""Small supernets, image sets and the plain loops that define what the evaluator computes."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.sampling import fair_archs
from bsnas.engine.space.space import Sharing, Space
from bsnas.engine.space.table import Cluster


def small_space(*, classes: int = 7, resolution: int = 16) -> Space:
    """Four clusters, among them one-block clusters in the middle and at the end."""

    def cluster(blocks: int, channels: tuple[int, ...], stride: int) -> Cluster:
        return mobile_cluster(blocks=blocks, kernels=(3, 5), expansions=(2, 3), channels=channels, stride=stride)

    return mobile_space(
        clusters=(
            cluster(2, (8, 12), 2),
            cluster(1, (12, 16, 24), 1),
            cluster(3, (16, 24), 2),
            cluster(1, (20, 24), 1),
        ),
        resolution=resolution,
        classes=classes,
        stem_channels=8,
        separable_channels=8,
        tail_channels=32,
    )


def shrunk_space(space: Space) -> Space:
    """Two operations a block where the cluster's channels allow it, and different numbers per channel option."""
    live = []
    for i, ops in enumerate(space.live):
        keep = space.live_channels(space.block_cluster[i])[-2:]
        chosen = [op for op in ops if op.channels in keep]
        live.append([*chosen[: 1 + i % 2], *[op for op in chosen if op.channels == keep[-1]][:2]])
    return space.with_live([tuple(dict.fromkeys(ops)) for ops in live])


def trained_like_supernet(space: Space, sharing: Sharing = "nested", seed: int = 0) -> Supernet:
    """A supernet whose normalisations have affine parameters and statistics of the size that training gives them."""
    torch.manual_seed(seed)
    supernet = Supernet(space, sharing)
    with torch.no_grad():
        for module in supernet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
        supernet.classifier.weight.normal_()
        images = torch.randn(24, 3, space.resolution, space.resolution)
        for arch in fair_archs(space, seed=5, count=space.max_live):
            supernet(images, arch)
    return supernet.eval()


@dataclass
class ArrayImages:
    """An evaluation set made of arrays, with what the evaluator asks of one."""

    images: np.ndarray
    labels: np.ndarray
    fingerprint: str = "array"
    mean: tuple[float, float, float] = (0.4, 0.5, 0.6)
    std: tuple[float, float, float] = (0.2, 0.25, 0.3)

    def normalized(self, chosen: Sequence[int] | slice = slice(None)) -> Tensor:
        """[n, 3, H, W], channels_last."""
        x = torch.from_numpy(self.images[chosen]).float() / 255
        return ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(0, 3, 1, 2)


def random_images(count: int, *, resolution: int = 16, classes: int = 7, seed: int = 0) -> ArrayImages:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, resolution, resolution, 3), dtype=np.uint8)
    return ArrayImages(images, rng.integers(0, classes, count), fingerprint=f"random {count} {seed}")


@torch.no_grad()
def loop_logits(supernet: Supernet, data: ArrayImages, archs: Sequence[Arch]) -> Tensor:
    """Logits [archs, N, classes], one network after another in eval mode."""
    images = data.normalized()
    supernet.eval()
    return torch.stack([supernet(images, arch) for arch in archs])


def labelled_images(supernet: Supernet, arch: Arch, count: int) -> ArrayImages:
    """Random images whose labels are the answers of one subnet, so that others differ in how often they agree."""
    data = random_images(count, classes=supernet.space.classes)
    data.labels = loop_logits(supernet, data, [arch])[0].argmax(1).numpy()
    return data


@torch.no_grad()
def recalibrated_alone(supernet: Supernet, data: ArrayImages, arch: Arch, batch: int) -> Supernet:
    """A copy of the supernet whose statistics on the path of one architecture are its own."""
    alone = copy.deepcopy(supernet).train()
    for module in alone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    order = visiting_order(len(data.labels))
    for start in range(0, len(order) // batch * batch, batch):
        alone(data.normalized(order[start : start + batch]), arch)
    return alone.eval()


def counts(logits: Tensor, labels: np.ndarray, *, best: int = 1) -> list[int]:
    """Correct answers per architecture from logits [archs, N, classes]."""
    hits = logits.topk(best, dim=-1).indices == torch.from_numpy(labels)[None, :, None]
    return hits.any(-1).sum(1).tolist()
