"""What every deployment backend offers: a session that runs one network at one batch size and precision."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bsnas.engine.release.int8 import quantize_onnx
from bsnas.engine.release.onnx import OnnxFormat, Precision, export_onnx
from bsnas.search.backends.plain_onnx import write_plain_onnx


class CannotRun(Exception):
    """A backend cannot run something here; the message is the reason, in one line."""


class Hardware(NamedTuple):
    """What latencies of a backend belong to."""

    device: str
    """The processor, with the number of threads on a CPU."""
    versions: str
    """Of the backend's software."""

    def __str__(self) -> str:
        return f"{self.device}; {self.versions}"


@dataclass(frozen=True)
class Model:
    """A network to deploy: normalised float32 images [N, 3, H, W] -> float32 logits [N, classes]."""

    name: str
    network: nn.Module
    """On the CPU, in evaluation mode."""
    resolution: int
    """H and W in pixels."""
    directory: Path
    """Where its ONNX files are made."""
    channels: int = 3
    """Of the images."""
    plain: bool = False
    """Whether it has only the layers of released networks, so that its file can be written in milliseconds."""

    calibration: npt.NDArray[np.float32] | None = None
    """Images [N, C, H, W] that INT8 takes its ranges from; random ones if there are none, when only time counts."""

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """C, H and W."""
        return self.channels, self.resolution, self.resolution

    def onnx_file(self, precision: Precision) -> Path:
        """The network as ONNX with a dynamic batch; made when first asked for."""
        file = self.directory / f"{self.name}-{precision}.onnx"
        if file.is_file():
            return file
        if precision == "int8":
            images = self.calibration
            if images is None:
                images = np.random.default_rng(0).standard_normal((4, *self.input_shape), dtype=np.float32)
            quantize_onnx(self.onnx_file("fp32"), file, images)
        elif self.plain:
            write_plain_onnx(self.network, file, input_shape=self.input_shape, precision=precision)
        else:
            export_onnx(
                self.network, file, OnnxFormat(resolution=self.resolution, channels=self.channels, precision=precision)
            )
        return file


class Session(Protocol):
    """A network ready to run on a device, for one batch size."""

    engine_bytes: int
    """Size of what is deployed: engine, ONNX file or weights."""

    def load(self, images: Tensor) -> None:
        """Put a full batch [N, C, H, W] where `run` reads it, on the device if there is one."""
        ...

    def run(self) -> None:
        """Compute the logits of the loaded batch; returns when they are there."""
        ...

    def logits(self) -> npt.NDArray[np.float32]:
        """The answer [N, classes] of the last `run`."""
        ...

    def layer_times_ms(self, repeats: int) -> list[tuple[str, float]]:
        """Median milliseconds of every layer that the backend runs, in order; apart from timing, which it disturbs.

        Raises `CannotRun` where the backend does not tell them.
        """
        ...


class Backend(Protocol):
    """One way to run networks."""

    name: str

    def describe(self) -> Hardware:
        """What it runs on and with. Raises `CannotRun` when it cannot run on this machine at all."""
        ...

    def open(self, model: Model, precision: Precision, batch: int) -> Session:
        """Make a network ready. Raises `CannotRun` when this precision or network is not for this backend."""
        ...


def session_logits(session: Session, images: Tensor, batch: int) -> npt.NDArray[np.float32]:
    """The session's answer [N, classes] to any number of images; the last batch is filled up by repetition."""
    parts = []
    for part in images.split(batch):
        missing = batch - len(part)
        session.load(torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]) if missing else part)
        session.run()
        parts.append(session.logits()[: len(part)].copy())
    return np.concatenate(parts)


def require_cuda() -> str:
    """The name of the GPU. Raises `CannotRun` when torch sees none."""
    if not torch.cuda.is_available():
        raise CannotRun("no CUDA device on this machine")
    return torch.cuda.get_device_name()


def cpu_with_threads() -> str:
    """The processor's model name and torch's number of threads, which every CPU backend takes."""
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
