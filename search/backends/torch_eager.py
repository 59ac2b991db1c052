"""PyTorch, eager, with batch normalisation folded and channels_last: the baseline of the other backends."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.folding import fold_batchnorm
from engine.onnx_export import DTYPES, Precision, first_line
from search.backends.base import CannotRun, Model, cpu_name, require_cuda


class TorchBackend:
    """Eager torch on the CPU or the current CUDA device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"torch-{device}"

    def describe(self) -> str:
        device = require_cuda() if self.device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
        return f"{device}; torch {torch.__version__}"

    def open(self, model: Model, precision: Precision, batch: int) -> "TorchSession":
        if self.device == "cuda":
            require_cuda()
        if precision == "int8":
            raise CannotRun("torch is not given INT8 here; ONNX Runtime and TensorRT run its Q/DQ file")
        network = fold_batchnorm(model.network).to(self.device, DTYPES[precision])
        network = network.to(memory_format=torch.channels_last)
        session = TorchSession(network, self.device, DTYPES[precision])
        try:
            session.load(torch.zeros(batch, *model.input_shape))
            session.run()
        except RuntimeError as error:
            raise CannotRun(f"torch has no {precision} here: {first_line(error)}") from None
        return session


class TorchSession:
    """A folded network and its input on one device."""

    def __init__(self, network: nn.Module, device: str, dtype: torch.dtype) -> None:
        self._network = network
        self._device = device
        self._dtype = dtype
        self._images: Tensor
        self._logits: Tensor

    def load(self, images: Tensor) -> None:
        self._images = images.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(self) -> None:
        self._logits = self._network(self._images)
        if self._device == "cuda":
            torch.cuda.synchronize()

    def logits(self) -> npt.NDArray[np.float32]:
        return self._logits.float().cpu().numpy()
