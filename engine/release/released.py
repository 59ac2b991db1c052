"""A released network of a run, and the images of its data set that it is checked and calibrated on."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from bsnas.engine.data.dataset import Dataset, open_dataset
from bsnas.engine.data.file_list import FileList
from bsnas.engine.data.loading.evaluation_set import evaluation_set, normalize
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet, release
from bsnas.engine.release.saved_network import load_network
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.arch import Arch


@dataclass(frozen=True)
class RealImages:
    """Images of a data set with their labels, raw and as networks take them."""

    pixels: npt.NDArray[np.uint8]
    """[N, H, W, C]."""
    labels: npt.NDArray[np.int64]
    mean: tuple[float, ...]
    """Of the normalisation, in units of 0 to 1."""
    std: tuple[float, ...]

    def inputs(self, kind: str) -> npt.NDArray[np.generic]:
        """The images as an ONNX file takes them: `uint8` pixels or `normalised`."""
        return self.pixels if kind == "uint8" else self.normalised().numpy()

    def normalised(self) -> torch.Tensor:
        """float32 [N, C, H, W] on the CPU."""
        return normalize(torch.from_numpy(self.pixels), self.mean, self.std, torch.float32).contiguous()


@dataclass(frozen=True)
class ReleasedNetwork:
    """A released network, on the CPU in evaluation mode. Images are decoded when they are asked for."""

    network: Subnet
    origin: Literal["retrained", "inherited"]
    data: Dataset

    def test_images(self, most: int) -> RealImages:
        """What it is checked on: test images where it was retrained, else search-validation images."""
        return self._evenly(self.data.open_test() if self.origin == "retrained" else self.data.search_val, most)

    def calibration_images(self, most: int = 512) -> RealImages:
        """Search-validation images for INT8's ranges; never those of the test set."""
        return self._evenly(self.data.search_val, most)

    def _evenly(self, files: FileList, most: int) -> RealImages:
        """Evenly spaced images of a list."""
        images = evaluation_set(files, self.data.config)
        rows = np.linspace(0, len(images) - 1, min(most, len(images))).astype(int)
        return RealImages(np.array(images.images[rows]), images.labels[rows], images.mean, images.std)


def retrained(run: RunDir) -> ReleasedNetwork:
    """The network that retraining left in a run. Raises `UserError` when there is none, or its data is not there."""
    file = run.retrain.network_file
    if not file.is_file():
        raise UserError(
            f"{run.path} holds no retrained network; train one with engine/retrain.py, "
            "or give --arch to take an architecture with inherited weights"
        )
    return ReleasedNetwork(load_network(file), "retrained", open_dataset(run.config().data, run.split_file))


def inherited(run: RunDir, arch: str) -> ReleasedNetwork:
    """An architecture with the supernet's weights. Raises `UserError` as `retrained` does, and for one of no sense."""
    parsed = Arch.parse(arch)
    alone = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    trained = TrainedRun.open(run.path, alone)
    return ReleasedNetwork(release(trained.supernet, parsed).eval(), "inherited", trained.data)
