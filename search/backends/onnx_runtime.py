"""ONNX Runtime on the CPU or on CUDA."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from bsnas.engine.host.errors import first_line
from bsnas.engine.release.onnx import Precision
from bsnas.search.backends.base import CannotRun, Hardware, Model, cpu_with_threads, require_cuda

_UNCOUNTED = 3
"""First runs of a profile, which allocate."""
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_OPTIONS = {"cpu": {}, "cuda": {"use_tf32": "0"}}
"""fp32 is fp32 (engine/host/precision.py)."""


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
            session = onnxruntime.InferenceSession(file, options, providers=[(provider, _OPTIONS[self.device])])
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
        """Median time of every node, in order, from a second session that ONNX Runtime profiles.

        Raises `CannotRun` on CUDA where ONNX Runtime was built without the profile of kernels.
        """
        options = self._session.get_session_options()
        provider = self._session.get_providers()[0]
        with TemporaryDirectory() as directory:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(directory) / "profile")
            profiled = onnxruntime.InferenceSession(
                self._content, options, providers=[(provider, _OPTIONS[self._device])]
            )
            for _ in range(repeats + _UNCOUNTED):
                profiled.run(None, {"images": self._images})
            events = json.loads(Path(profiled.end_profiling()).read_text())
        times = kernel_times_ms(events) if self._device == "cuda" else node_times_ms(events)
        return [(name, float(np.median(values[_UNCOUNTED:] or values))) for name, values in times.items()]


def node_times_ms(events: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """What each node took in each run, by the host's clock: what it computed on a CPU, what it launched on a GPU."""
    times: dict[str, list[float]] = {}
    for event in events:
        if _is_node(event):
            times.setdefault(_label(event), []).append(event["dur"] / 1e3)
    return times


def kernel_times_ms(events: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """What the kernels of each node took in each run, by the GPU's clock.

    A kernel follows the node that launched it and names it as its parent. Raises `CannotRun` when there are none.
    """
    times: dict[str, list[float]] = {}
    labels: dict[str, str] = {}
    named = 0
    for event in events:
        if _is_node(event):
            labels[event["name"]] = _label(event)
            times.setdefault(_label(event), []).append(0.0)
        elif event.get("cat") == "Kernel" and (label := labels.get(event["args"].get("parent_name", ""))):
            times[label][-1] += event["dur"] / 1e3
            named += 1
    if not named:
        raise CannotRun(
            "this onnxruntime tells no times of CUDA kernels, only how long the host took to launch them; "
            "profile torch-cuda or tensorrt instead"
        )
    return times


def _is_node(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith("_kernel_time")


def _label(node: dict[str, Any]) -> str:
    return f"{node['args']['op_name']} {node['name'].removesuffix('_kernel_time')}"
