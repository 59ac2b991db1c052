"""TensorRT and TensorRT-RTX: engines from typed ONNX files.

Both packages have one Python API and are optional (`pip install bsnas[tensorrt]`, `bsnas[tensorrt-rtx]`). Networks are
strongly typed: the precision is the one that the ONNX file was exported with. TensorRT-RTX also builds engines ahead of
time for named GPU generations on a machine that has no GPU.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import first_line
from bsnas.engine.release.onnx import Precision
from bsnas.search.backends.base import CannotRun, Hardware, Model, require_cuda

TIMING_CACHES = Path("~/.cache/bsnas/tensorrt").expanduser()
"""Where the builder's layer timings are kept, a file per package, version and GPU."""
RTX_TARGETS = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
"""GPU generations that TensorRT-RTX builds for; Hopper (SM90) is not among them."""


class EngineLayer(NamedTuple):
    """A kernel of an engine, or what stands for one, and the operators of the ONNX file that it computes."""

    kind: str
    name: str
    operators: tuple[str, ...]

    @classmethod
    def parse(cls, line: str) -> "EngineLayer | None":
        """A line of the builder's list of layers; None for any other line."""
        found = re.match(r"Name: (.+?), LayerType: (\w+), ", line)
        return cls(found[2], found[1], tuple(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line))) if found else None


class Engine(NamedTuple):
    """What the builder made of a network."""

    content: bytes
    """Serialized."""
    layers: tuple[EngineLayer, ...]
    """Those that it runs, in order, after fusion; none where the builder does not list them."""


class TensorRTBackend:
    """One of the two packages: `tensorrt` or `tensorrt_rtx`; with `graph`, a run replays a captured CUDA graph."""

    def __init__(self, package: str, *, graph: bool = False) -> None:
        self.package = package
        self.graph = graph
        self.name = package.replace("_", "-") + ("-graph" if graph else "")

    def describe(self) -> Hardware:
        trt = import_package(self.package)
        device = require_cuda()
        if self.package == "tensorrt_rtx":
            generation = "SM{}{}".format(*torch.cuda.get_device_capability())
            if not hasattr(trt.ComputeCapability, generation):
                raise CannotRun(f"TensorRT-RTX has no {generation}, which {device} is")
        return Hardware(device, f"{self.package.replace('_', '-')} {trt.__version__}")

    def open(self, model: Model, precision: Precision, batch: int) -> "TensorRTSession":
        self.describe()
        trt = import_package(self.package)
        cache = TIMING_CACHES / f"{self.package}-{trt.__version__}-{require_cuda().replace(' ', '-')}.cache"
        content = model.onnx_file(precision).read_bytes()
        engine = build_engine(trt, content, (batch, batch, batch), timing_cache=cache)
        return TensorRTSession(trt, engine.content, batch, graph=self.graph)


class TensorRTSession:
    """An engine, its execution context and its buffers on the current CUDA device."""

    def __init__(self, trt: ModuleType, engine: bytes, batch: int, *, graph: bool = False) -> None:
        self.engine_bytes = len(engine)
        self._trt = trt
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise CannotRun("the engine that was built does not load on this GPU")
        self._context = execution_context(trt, self._engine)
        self._stream = torch.cuda.Stream()
        shape = (batch, *tuple(self._engine.get_tensor_shape("images"))[1:])
        self._context.set_input_shape("images", shape)
        self._images = torch.empty(shape, device="cuda")
        self._logits = torch.empty(tuple(self._context.get_tensor_shape("logits")), device="cuda")
        self._context.set_tensor_address("images", self._images.data_ptr())
        self._context.set_tensor_address("logits", self._logits.data_ptr())
        self._graph = self._captured() if graph else None

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The launches of a run as one graph. A run before it allocates what may not be allocated inside."""
        graph = torch.cuda.CUDAGraph()
        try:
            self._launch()
            self._stream.synchronize()
            with torch.cuda.graph(graph, stream=self._stream):
                self._launch()
        except RuntimeError as error:
            raise CannotRun(f"the engine cannot be captured as a CUDA graph: {first_line(error)}") from None
        return graph

    def _launch(self) -> None:
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise CannotRun("the engine failed while running")

    def load(self, images: Tensor) -> None:
        self._images.copy_(images)
        torch.cuda.synchronize()

    def run(self) -> None:
        if self._graph is None:
            self._launch()
        else:
            with torch.cuda.stream(self._stream):
                self._graph.replay()
        self._stream.synchronize()

    def layer_times_ms(self, repeats: int) -> list[tuple[str, float]]:
        """Median time of every layer of the engine, in order. Layers run one by one, so their sum exceeds a run."""
        times: dict[str, list[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[name-defined]
            def report_layer_time(self, layer: str, ms: float) -> None:
                times.setdefault(layer, []).append(ms)

        self._context.profiler = Profiler()
        for _ in range(repeats):
            self._launch()
            self._stream.synchronize()
        return [(name, float(np.median(values))) for name, values in times.items()]

    def logits(self) -> npt.NDArray[np.float32]:
        return self._logits.cpu().numpy()


def execution_context(trt: ModuleType, engine: Any) -> Any:
    """A context whose first run of a shape is as fast as the later ones.

    TensorRT-RTX makes kernels for the shape in the background unless told to wait for them, and runs general ones until
    then: a graph captured at once would keep those, and timing would see both.
    """
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)


def import_package(package: str) -> ModuleType:
    """Raises `CannotRun` when the package is not installed or does not load."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = package.replace("_", "-")
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise CannotRun(f"{package} is not installed; pip install bsnas[{extra}] brings it") from None
        raise CannotRun(f"{package} does not load: {first_line(error)}") from None


def build_engine(
    trt: ModuleType,
    content: bytes,
    batches: tuple[int, int, int],
    target: str | None = None,
    timing_cache: Path | None = None,
) -> Engine:
    """Build an engine, for this machine's GPU or ahead of time for another one.

    Args:
        trt: the package.
        content: of the ONNX file.
        batches: smallest, usual and largest batch size.
        target: GPU generation to build for without having it, as `SM89` (TensorRT-RTX only); this machine's if None.
        timing_cache: file of layer timings that earlier builds left; made or extended where the package has them.

    Raises `CannotRun` with the builder's own words when it does not build.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if builder is None:
        raise CannotRun(f"the builder does not start: {logger.reason()}")
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(content):
        said = first_line(Exception(parser.get_error(0).desc())) if parser.num_errors else logger.reason()
        raise CannotRun(f"the ONNX file is not understood by {trt.__name__} {trt.__version__}{_opset(content)}: {said}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32 (engine/host/precision.py)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # makes the builder list the layers
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    images = network.get_input(0)
    shape = tuple(images.shape)[1:]
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, *((batch, *shape) for batch in batches))
    config.add_optimization_profile(profile)
    if timing_cache is not None and hasattr(config, "create_timing_cache"):
        _use_timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CannotRun(f"the engine does not build: {logger.reason()}")
    if timing_cache is not None and hasattr(config, "get_timing_cache"):
        timings = config.get_timing_cache()
        if timings is not None:
            write_atomically(timing_cache, bytes(timings.serialize()))
    return Engine(bytes(engine), tuple(logger.layers))


def _use_timing_cache(config: Any, file: Path) -> None:
    """Build with the timings of a file, or with none yet where the builder refuses what it holds, as another GPU's."""
    for known in (file.read_bytes() if file.is_file() else b"", b""):
        cache = config.create_timing_cache(known)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def _opset(content: bytes) -> str:
    """An ONNX file's operator set, in words: that of bfloat16 (engine/release/onnx.py) is too new for some parsers."""
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        return ""
    return f", opset {model.opset_import[0].version}" if model.opset_import else ""


def _logger(trt: ModuleType) -> Any:
    """A logger that is silent and remembers errors and the list of layers. Its base class comes with the package."""

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[EngineLayer] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif message.startswith("Layers:\n"):
                self.layers = [layer for line in message.splitlines() if (layer := EngineLayer.parse(line))]

        def reason(self) -> str:
            return first_line(Exception(self.errors[0])) if self.errors else "no reason given"

    return Logger()
