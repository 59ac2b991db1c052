"""PyTorch, eager, with batch normalisation folded and channels_last: the baseline of the other backends."""

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bsnas.engine.host.errors import first_line
from bsnas.engine.host.precision import exact_float32
from bsnas.engine.networks.fold_batchnorm import fold_batchnorm
from bsnas.engine.release.onnx import DTYPES, Precision
from bsnas.search.backends.base import CannotRun, Hardware, Model, cpu_with_threads, require_cuda


class TorchBackend:
    """Eager torch on the CPU or the current CUDA device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"torch-{device}"

    def describe(self) -> Hardware:
        device = require_cuda() if self.device == "cuda" else cpu_with_threads()
        return Hardware(device, f"torch {torch.__version__}")

    def open(self, model: Model, precision: Precision, batch: int) -> "TorchSession":
        if self.device == "cuda":
            require_cuda()
            exact_float32()
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
        self.engine_bytes = sum(p.numel() * p.element_size() for p in network.parameters())
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

    @torch.inference_mode()
    def layer_times_ms(self, repeats: int) -> list[tuple[str, float]]:
        """Median time of every leaf module, in order, the device waited for after each."""
        times: dict[str, list[float]] = {}
        started: dict[str, float] = {}

        def now() -> float:
            if self._device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def before(name: str) -> None:
            started[name] = now()

        def after(name: str) -> None:
            times.setdefault(name, []).append((now() - started[name]) * 1e3)

        hooks = []
        for name, layer in self._network.named_modules():
            if not any(layer.children()) and not isinstance(layer, (nn.Identity, nn.Sequential)):
                label = f"{type(layer).__name__} {name}"
                hooks.append(layer.register_forward_pre_hook(lambda m, i, label=label: before(label)))
                hooks.append(layer.register_forward_hook(lambda m, i, o, label=label: after(label)))
        self.run()
        times.clear()
        for _ in range(repeats):
            self.run()
        for hook in hooks:
            hook.remove()
        return [(name, float(np.median(values))) for name, values in times.items()]

    def logits(self) -> npt.NDArray[np.float32]:
        return self._logits.float().cpu().numpy()
