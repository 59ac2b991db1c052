"""ONNX Runtime on the CPU or on CUDA."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from bsnas.engine.release.onnx import Precision, first_line
from bsnas.search.backends.base import CannotRun, Hardware, Model, cpu_with_threads, require_cuda

_UNCOUNTED = 3
"""First runs of a profile, which allocate."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """One execution provider of ONNX Runtime."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.name = f"onnxruntime-{device}"

    def describe(self) -> Hardware:
        if _PROVIDERS[self.device] not in onnxruntime.get_available_providers():
            raise CannotRun("the installed onnxruntime has no CUDA provider; pip install onnxruntime-gpu has it")
        device = require_cuda() if self.device == "cuda" else cpu_with_threads()
        return Hardware(device, f"onnxruntime {onnxruntime.__version__}")

    def open(self, model: Model, precision: Precision, batch: int) -> "OnnxRuntimeSession":
        self.describe()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        provider = _PROVIDERS[self.device]
        file = model.onnx_file(precision)
        try:
            session = onnxruntime.InferenceSession(file, options, providers=[provider])
        except Exception as error:  # onnxruntime's own kinds, one per status code
            raise CannotRun(f"{provider} does not run {precision}: {first_line(error)}") from None
        if session.get_providers()[0] != provider:
            raise CannotRun(f"{provider} did not start; onnxruntime fell back to {session.get_providers()[0]}")
        return OnnxRuntimeSession(session, self.device, file.read_bytes())


class OnnxRuntimeSession:
    """An inference session with its input bound to the device and its output left there."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str, content: bytes) -> None:
        self.engine_bytes = len(content)
        self._content = content
        self._images = np.empty(0, np.float32)
        self._session = session
        self._device = device
        self._binding = session.io_binding()

    def load(self, images: Tensor) -> None:
        self._images = images.contiguous().numpy()
        value = onnxruntime.OrtValue.ortvalue_from_numpy(self._images, self._device, 0)
        self._binding.bind_ortvalue_input("images", value)
        self._binding.bind_output("logits", self._device, 0)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()

    def logits(self) -> npt.NDArray[np.float32]:
        return self._binding.copy_outputs_to_cpu()[0]

    def layer_times_ms(self, repeats: int) -> list[tuple[str, float]]:
        """Median time of every kernel, in order, from a second session that ONNX Runtime profiles."""
        options = self._session.get_session_options()
        with TemporaryDirectory() as directory:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(directory) / "profile")
            profiled = onnxruntime.InferenceSession(self._content, options, providers=self._session.get_providers())
            for _ in range(repeats + _UNCOUNTED):
                profiled.run(None, {"images": self._images})
            events = json.loads(Path(profiled.end_profiling()).read_text())
        times: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                name = f"{event['args']['op_name']} {event['name'].removesuffix('_kernel_time')}"
                times.setdefault(name, []).append(event["dur"] / 1e3)
        return [(name, float(np.median(values[_UNCOUNTED:] or values))) for name, values in times.items()]
