"""TensorRT and TensorRT-RTX: engines from typed ONNX files.

Both packages have one Python API and are optional (`pip install bsnas[tensorrt]`, `bsnas[tensorrt-rtx]`). Networks are
strongly typed: the precision is the one that the ONNX file was exported with. TensorRT-RTX also builds engines ahead of
time for named GPU generations on a machine that has no GPU.
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.onnx_export import Precision, first_line
from search.backends.base import CannotRun, Model, require_cuda

RTX_TARGETS = ("SM75", "SM80", "SM86", "SM89", "SM120")
"""GPU generations that TensorRT-RTX builds for; Hopper (SM90) is not among them."""


class TensorRTBackend:
    """One of the two packages: `tensorrt` or `tensorrt_rtx`."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.name = package.replace("_", "-")

    def describe(self) -> str:
        trt = import_package(self.package)
        device = require_cuda()
        if self.package == "tensorrt_rtx":
            generation = "SM{}{}".format(*torch.cuda.get_device_capability())
            if not hasattr(trt.ComputeCapability, generation):
                raise CannotRun(f"TensorRT-RTX has no {generation}, which {device} is")
        return f"{device}; {self.name} {trt.__version__}"

    def open(self, model: Model, precision: Precision, batch: int) -> "TensorRTSession":
        self.describe()
        trt = import_package(self.package)
        engine = build_engine(trt, model.onnx_file(precision).read_bytes(), (batch, batch, batch))
        return TensorRTSession(trt, engine, batch)


class TensorRTSession:
    """An engine, its execution context and its buffers on the current CUDA device."""

    def __init__(self, trt: ModuleType, engine: bytes, batch: int) -> None:
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise CannotRun("the engine that was built does not load on this GPU")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
        shape = (batch, *tuple(self._engine.get_tensor_shape("images"))[1:])
        self._context.set_input_shape("images", shape)
        self._images = torch.empty(shape, device="cuda")
        self._logits = torch.empty(tuple(self._context.get_tensor_shape("logits")), device="cuda")
        self._context.set_tensor_address("images", self._images.data_ptr())
        self._context.set_tensor_address("logits", self._logits.data_ptr())

    def load(self, images: Tensor) -> None:
        self._images.copy_(images)
        torch.cuda.synchronize()

    def run(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise CannotRun("the engine failed while running")
        self._stream.synchronize()

    def logits(self) -> npt.NDArray[np.float32]:
        return self._logits.cpu().numpy()


def import_package(package: str) -> ModuleType:
    """Raises `CannotRun` when the package is not installed or does not load."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = package.replace("_", "-")
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise CannotRun(f"{package} is not installed; pip install bsnas[{extra}] brings it") from None
        raise CannotRun(f"{package} does not load: {first_line(error)}") from None


def build_engine(trt: ModuleType, onnx: bytes, batches: tuple[int, int, int], target: str | None = None) -> bytes:
    """A serialized engine.

    Args:
        trt: the package.
        onnx: content of the ONNX file.
        batches: smallest, usual and largest batch size.
        target: GPU generation to build for without having it, as `SM89` (TensorRT-RTX only); this machine's if None.

    Raises `CannotRun` with the builder's own words when it does not build.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise CannotRun(f"the builder does not start: {logger.reason()}")
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx):
        raise CannotRun(f"the ONNX file is not understood: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    images = network.get_input(0)
    shape = tuple(images.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((batch, *shape) for batch in batches))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CannotRun(f"the engine does not build: {logger.reason()}")
    return bytes(engine)


def _logger(trt: ModuleType) -> Any:
    """A logger that is silent and remembers errors. Its base class comes with the package."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return first_line(Exception(self.errors[0])) if self.errors else "no reason given"

    return Logger()
