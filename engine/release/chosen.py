"""The released network that a run's user means: the retrained one, or an architecture with inherited weights."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.data.loading.evaluation_set import EvaluationSet, evaluation_set, normalize
from bsnas.engine.evaluation.of_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet, release
from bsnas.engine.release.network_file import load_network
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.space import Arch


@dataclass(frozen=True)
class RealImages:
    """Images of a data set with their labels, raw and as networks take them."""

    pixels: npt.NDArray[np.uint8]
    """[N, H, W, 3]."""
    labels: npt.NDArray[np.int64]
    mean: tuple[float, ...]
    """Of the normalisation, in units of 0 to 1."""
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, kind: str) -> npt.NDArray[np.generic]:
        """The images as an ONNX file takes them: `uint8` pixels or `normalised`."""
        return self.pixels if kind == "uint8" else self.normalised().numpy()

    def normalised(self) -> torch.Tensor:
        """float32 [N, 3, H, W] on the CPU."""
        return normalize(torch.from_numpy(self.pixels), self.mean, self.std, torch.float32).contiguous()


@dataclass(frozen=True)
class ChosenNetwork:
    """A released network, on the CPU in evaluation mode, and what it is to be checked on."""

    network: Subnet
    origin: Literal["retrained", "inherited"]
    classes: tuple[str, ...]
    """Names of the classes."""
    images: RealImages
    calibration: RealImages
    """Search-validation images for INT8's ranges; never those of the test set."""


def choose_network(run: RunDir, arch: str | None, max_images: int, calibration_images: int = 512) -> ChosenNetwork:
    """The retrained network of a run with test images, or `arch` as inherited with search-validation images.

    Images are evenly spaced over their set. Raises `UserError` when there is no such network, or its data is not there.
    """
    config = run.config()
    if arch is None:
        if not run.retrain.network_file.is_file():
            raise UserError(
                f"{run.path} holds no retrained network; train one with engine/retrain.py, "
                "or give --arch to take an architecture with inherited weights"
            )
        network = load_network(run.retrain.network_file)
    else:
        parsed = Arch.parse(arch)
        alone = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        network = release(TrainedRun.open(run.path, alone).supernet, parsed).eval()
    data = open_dataset(config.data, run.split_file)
    images = evaluation_set(data.open_test() if arch is None else data.search_val, config.data)
    search_val = images if arch is not None else evaluation_set(data.search_val, config.data)
    return ChosenNetwork(
        network,
        "retrained" if arch is None else "inherited",
        data.classes,
        _evenly(images, max_images),
        _evenly(search_val, calibration_images),
    )


def _evenly(images: EvaluationSet, most: int) -> RealImages:
    """Evenly spaced images of a set."""
    rows = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
    return RealImages(np.array(images.images[rows]), images.labels[rows], images.mean, images.std)
