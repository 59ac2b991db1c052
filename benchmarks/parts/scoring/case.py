"""What the evaluation benchmark scores: real images, a trained supernet of Table 1, its full and shrunk spaces."""

import gzip
import hashlib
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch.nn import functional as F

from bsnas.engine.checkpoints.tensor_file import load_weights
from bsnas.engine.evaluation.images import visiting_order
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.supernet import Supernet
from bsnas.engine.space.sampling import fair_round
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named

TRAINING_IMAGES = 6000
BATCH = 32
LEARNING_RATE = 0.05
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """An evaluation set made of arrays; the fields are those of `EvaluationSet`."""

    images: np.ndarray
    labels: np.ndarray
    fingerprint: str
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.25, 0.25, 0.25)

    def first(self, count: int) -> "ImageArrays":
        """The first of them."""
        identity = f"{self.fingerprint}, first {count}"
        return replace(self, images=self.images[:count], labels=self.labels[:count], fingerprint=identity)


def load_images(start: int, stop: int, resolution: int) -> ImageArrays:
    """Training images of Fashion-MNIST where Debian's package is installed, else of scikit-learn's digits, scaled up.

    Those from start to stop - 1 of a random order; digits repeat when there are fewer. The test images are not read.
    """
    if FASHION_MNIST.is_dir():
        name = "fashion-mnist"
        raw = gzip.decompress((FASHION_MNIST / "train-images-idx3-ubyte.gz").read_bytes())
        gray = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(
            gzip.decompress((FASHION_MNIST / "train-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
        )
    else:
        from sklearn.datasets import load_digits

        name, digits = "digits", load_digits()
        gray, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    chosen = np.array(visiting_order(len(labels)))[np.arange(start, stop) % len(labels)]
    pixels = torch.from_numpy(gray[chosen]).float()[:, None]
    pixels = F.interpolate(pixels, size=(resolution, resolution), mode="bilinear").round().byte()
    images = pixels.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
    return ImageArrays(images, labels[chosen].astype(np.int64), f"{name} {start} {stop} at {resolution}")


def full_space(resolution: int) -> Space:
    return replace(space_named("imagenet"), classes=10, resolution=resolution)


def shrunk_space(space: Space, operations: int = 3) -> Space:
    """`operations` per block, of one channel number in each cluster."""
    rng = random.Random(0)
    live: list[list] = []
    for j, blocks in enumerate(space.cluster_blocks):
        channels = rng.choice(space.live_channels(j))
        for i in blocks:
            live.append(rng.sample([op for op in space.live[i] if op.channels == channels], operations))
    return space.with_live(live)


def trained_supernet(steps: int, resolution: int, cache: Path, device: torch.device, console: Console) -> Supernet:
    """A supernet of the full space with nested weights, trained by fair rounds of single paths; kept in `cache`."""
    space, images = full_space(resolution), load_images(0, TRAINING_IMAGES, resolution)
    identity = f"{space.fingerprint} {images.fingerprint} {steps} {BATCH} {LEARNING_RATE}"
    file = cache / f"benchmark-supernet-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"
    torch.manual_seed(0)
    supernet = Supernet(space, "nested").to(device)
    if file.exists():
        load_weights(supernet, _kept_weights(file), file)
        return supernet.eval()
    console.print(f"training a supernet for {steps} steps of {BATCH} images, once; kept in {file}")
    _train(supernet, images, steps, device, console)
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    torch.save(supernet.state_dict(), unfinished)
    unfinished.replace(file)
    return supernet.eval()


def _kept_weights(file: Path) -> Any:
    """Raises `UserError` for a file that is damaged."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"kept supernet {file} cannot be read: {line:.200}; remove it to train it again") from None


def _train(supernet: Supernet, images: ImageArrays, steps: int, device: torch.device, console: Console) -> None:
    optimizer = torch.optim.SGD(supernet.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    pixels, labels = torch.from_numpy(images.images).to(device), torch.from_numpy(images.labels).to(device)
    rng = np.random.default_rng(0)
    paths: list = []
    started, losses = time.perf_counter(), []
    supernet.train()
    for step in range(steps):
        if not paths:
            paths = fair_round(supernet.space, 0, step // supernet.space.max_live)
        chosen = torch.from_numpy(rng.integers(0, len(labels), BATCH)).to(device)
        x = ((pixels[chosen].float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2)
        loss = F.cross_entropy(supernet(x, paths.pop()), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            speed = (step + 1) / (time.perf_counter() - started)
            console.print(f"  step {step + 1}: loss {np.mean(losses[-50:]):.3f}, {speed:.1f} steps/s")
