"""Backends that run released networks, for parity checks and latency."""

from bsnas.search.backends.base import Backend, CannotRun, Hardware, Model, Session, session_logits
from bsnas.search.backends.onnx_runtime import OnnxRuntimeBackend
from bsnas.search.backends.tensorrt import TensorRTBackend
from bsnas.search.backends.torch_eager import TorchBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        TorchBackend("cpu"),
        TorchBackend("cuda"),
        OnnxRuntimeBackend("cpu"),
        OnnxRuntimeBackend("cuda"),
        TensorRTBackend("tensorrt"),
        TensorRTBackend("tensorrt", graph=True),
        TensorRTBackend("tensorrt_rtx"),
        TensorRTBackend("tensorrt_rtx", graph=True),
    )
}
"""Every backend by name, whether it can run here or not."""

__all__ = ["BACKENDS", "Backend", "CannotRun", "Hardware", "Model", "Session", "session_logits"]
