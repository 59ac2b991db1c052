"""ONNX Runtime on the CPU or on CUDA."""

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from engine.onnx_export import Precision, first_line
from search.backends.base import CannotRun, Model, cpu_name, require_cuda

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """One execution provider of ONNX Runtime."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"onnxruntime-{device}"

    def describe(self) -> str:
        if _PROVIDERS[self.device] not in onnxruntime.get_available_providers():
            raise CannotRun("the installed onnxruntime has no CUDA provider; pip install onnxruntime-gpu has it")
        device = require_cuda() if self.device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
        return f"{device}; onnxruntime {onnxruntime.__version__}"

    def open(self, model: Model, precision: Precision, batch: int) -> "OnnxRuntimeSession":
        self.describe()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = _PROVIDERS[self.device]
        try:
            session = onnxruntime.InferenceSession(model.onnx_file(precision), options, providers=[provider])
        except Exception as error:  # onnxruntime's own kinds, one per status code
            raise CannotRun(f"{provider} does not run {precision}: {first_line(error)}") from None
        if session.get_providers()[0] != provider:
            raise CannotRun(f"{provider} did not start; onnxruntime fell back to {session.get_providers()[0]}")
        return OnnxRuntimeSession(session, self.device)


class OnnxRuntimeSession:
    """An inference session with its input bound to the device and its output left there."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self._session = session
        self._device = device
        self._binding = session.io_binding()

    def load(self, images: Tensor) -> None:
        value = onnxruntime.OrtValue.ortvalue_from_numpy(images.contiguous().numpy(), self._device, 0)
        self._binding.bind_ortvalue_input("images", value)
        self._binding.bind_output("logits", self._device, 0)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def logits(self) -> npt.NDArray[np.float32]:
        return self._binding.copy_outputs_to_cpu()[0]
