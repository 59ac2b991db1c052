"""Every backend that runs here answers like torch; every other says why it does not."""

import importlib.util
import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from bsnas.benchmarks.parts.timing.latency_rows import Case, write_profile
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.onnx import onnx_logits, torch_logits
from bsnas.engine.space.sampling import uniform_arch
from bsnas.search.backends import BACKENDS, CannotRun, Model, onnx_runtime, session_logits, torch_eager
from bsnas.search.backends.onnx_runtime import kernel_times_ms
from bsnas.search.backends.tensorrt import RTX_TARGETS, EngineLayer, build_engine, execution_context, import_package
from bsnas.search.backends.timing import interleaved_ms, measure_in_turn
from tests.search.runs import small_space

CPU = ("torch-cpu", "onnxruntime-cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    space = small_space()
    torch.manual_seed(0)
    network = Subnet(space, uniform_arch(space, random.Random(1)))
    with torch.no_grad():
        network.classifier.weight.mul_(30)
        network(torch.randn(64, 3, 16, 16))
    return Model("small", network.eval(), 16, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("batch", [1, 4])
def test_cpu_backends_answer_like_torch_and_are_timed(model, name, batch):
    images = torch.randn(9, 3, 16, 16)
    session = BACKENDS[name].open(model, "fp32", batch)
    np.testing.assert_allclose(session_logits(session, images, batch), torch_logits(model.network, images), atol=1e-4)
    (timed,) = measure_in_turn(
        [session], batch, repeats=30, passes=3, max_seconds=10, warmup_seconds=0, rng=random.Random(0)
    )
    latency = timed.latency
    assert latency.repeats == 30
    assert 0 < latency.min_ms <= latency.p50_ms <= latency.p90_ms <= latency.p99_ms
    assert latency.images_per_s == pytest.approx(batch / latency.p50_ms * 1e3)
    assert timed.slowdown >= 0.9


@pytest.mark.parametrize("name", CPU)
def test_layers_are_timed_apart_and_the_size_is_told(model, name):
    session = BACKENDS[name].open(model, "fp32", 4)
    session.load(torch.randn(4, 3, 16, 16))
    layers = session.layer_times_ms(5)
    convolutions = [layer for layer, _ in layers if layer.startswith("Conv")]
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in model.network.modules()) + (
        name == "onnxruntime-cpu"
    ), "the classifier is a convolution in ONNX"
    assert all(ms >= 0 for _, ms in layers)
    weights = sum(p.numel() * 4 for p in model.network.parameters())
    assert 0.5 * weights < session.engine_bytes < 10 * weights + 20_000


def test_int8_runs_in_onnx_runtime_and_not_in_torch(model):
    images = torch.randn(8, 3, 16, 16)
    logits = session_logits(BACKENDS["onnxruntime-cpu"].open(model, "int8", 8), images, 8)
    expected = torch_logits(model.network, images)
    assert 0 < np.abs(logits - expected).max() < 0.5 * np.abs(expected).max()
    with pytest.raises(CannotRun, match="torch is not given INT8 here"):
        BACKENDS["torch-cpu"].open(model, "int8", 8)


@pytest.mark.parametrize("name", CPU)
def test_cpu_backends_name_device_threads_and_version(name):
    hardware = BACKENDS[name].describe()
    assert hardware.device.endswith(f", {torch.get_num_threads()} threads")
    assert hardware.versions.split() == [name.removesuffix("-cpu"), hardware.versions.split()[-1]]


def weight_types(file) -> set[int]:
    return {weight.data_type for weight in onnx.load(file).graph.initializer if len(weight.dims) == 4}


def test_half_precision_is_in_the_weights_and_differs_by_its_rounding_only(model):
    images = torch.randn(8, 3, 16, 16)
    expected = torch_logits(model.network, images)
    for name in CPU:
        logits = session_logits(BACKENDS[name].open(model, "fp16", 8), images, 8)
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - expected).max() < 0.02 * np.abs(expected).max(), name
    assert weight_types(model.onnx_file("fp16")) == {onnx.TensorProto.FLOAT16}


def event(kind: str, name: str, us: float, **arguments: str) -> dict:
    return {"cat": kind, "name": name, "dur": us, "args": arguments}


def profile_of_two_runs(kernels: bool) -> list[dict]:
    """As ONNX Runtime writes it on CUDA: a node's time ends with its launches, and its kernels follow."""
    events = []
    for run in (1, 2):
        for name, op, times in (("conv_1", "Conv", (200, 300)), ("pool", "ReduceMean", (40,))):
            node = f"{name}_kernel_time"
            events.append(event("Node", f"{name}_fence_before", 1, op_name=op))
            events.append(event("Node", node, 7, op_name=op))
            events += [event("Kernel", "k", us * run, op_name=op, parent_name=node) for us in times if kernels]
        if kernels:
            events.append(event("Kernel", "MemcpyDtoH", 1000))
        events.append(event("Session", "model_run", 5000))
    return events


def test_layers_on_cuda_take_what_their_kernels_take_and_not_their_launches():
    assert kernel_times_ms(profile_of_two_runs(kernels=True)) == {
        "Conv conv_1": [pytest.approx(0.5), pytest.approx(1.0)],
        "ReduceMean pool": [pytest.approx(0.04), pytest.approx(0.08)],
    }
    with pytest.raises(
        CannotRun, match=r"this onnxruntime tells no times of CUDA kernels, only how long the host took"
    ):
        kernel_times_ms(profile_of_two_runs(kernels=False))


def test_a_session_without_times_of_layers_leaves_no_profile(tmp_path, capsys):
    class Untold:
        def layer_times_ms(self, repeats: int) -> list[tuple[str, float]]:
            raise CannotRun("nothing is told")

    row = {"network": "small", "backend": "onnxruntime-cuda", "precision": "fp32", "batch": 8}
    write_profile(Case(Untold(), row), tmp_path)  # type: ignore[arg-type]
    assert capsys.readouterr().out == "no profile of small-onnxruntime-cuda-fp32-b8: nothing is told\n"
    assert not list(tmp_path.iterdir())


def test_fp32_is_not_tf32_in_onnx_runtime(model, monkeypatch):
    """The CUDA provider rounds to TF32 unless told not to; the session is a stand-in."""
    asked = []

    class Session:
        def __init__(self, file, options, providers) -> None:
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

        def io_binding(self) -> None: ...

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnx_runtime, "require_cuda", lambda: "a GPU")
    BACKENDS["onnxruntime-cuda"].open(model, "fp32", 1)
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0"})]]


def test_fp32_is_not_tf32_in_torch(model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch_eager, "require_cuda", lambda: "a GPU")
    with pytest.raises((AssertionError, RuntimeError)):  # torch has no CUDA here, or no GPU
        BACKENDS["torch-cuda"].open(model, "fp32", 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


class SlowSession:
    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1


def in_turn(*sessions, passes: int, repeats: int = 10**6, max_seconds: float = 0.0, warmup_seconds: float = 0.0):
    return measure_in_turn(
        sessions,
        8,
        repeats=repeats,
        passes=passes,
        max_seconds=max_seconds,
        warmup_seconds=warmup_seconds,
        rng=random.Random(0),
    )


def test_slow_rows_end_early_but_have_three_runs_in_every_pass():
    session = SlowSession()
    (timed,) = in_turn(session, passes=4)
    assert timed.latency.repeats == 12
    assert session.runs == 16
    in_turn(session, passes=4, warmup_seconds=0.01)
    assert session.runs > 100, "the warmup lasts"


def test_a_slow_spell_meets_all_rows_and_is_told(monkeypatch):
    """A machine that is five times slower in the second of two passes: both rows double alike, and say so."""
    clock = {"now": 0.0, "runs": 0}

    class TickingSession:
        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def run(self) -> None:
            clock["runs"] += 1
            clock["now"] += self.seconds * (5 if clock["runs"] > 22 else 1)

    monkeypatch.setattr("bsnas.search.backends.timing.time.perf_counter", lambda: clock["now"])
    fast, slow = in_turn(TickingSession(0.001), TickingSession(0.002), passes=2, repeats=20, max_seconds=100)
    assert (fast.latency.min_ms, slow.latency.min_ms) == (pytest.approx(1), pytest.approx(2))
    assert (fast.latency.p50_ms, slow.latency.p50_ms) == (pytest.approx(3), pytest.approx(6))
    assert (fast.slowdown, slow.slowdown) == (pytest.approx(3), pytest.approx(3))
    assert slow.latency.images_per_s == pytest.approx(8 / 6e-3)


def test_interleaved_times_have_a_row_per_visit_and_end_in_time():
    sessions = [SlowSession(), SlowSession()]
    times = interleaved_ms(sessions, visits=7, calls=2, max_seconds=10, rng=random.Random(0))  # type: ignore[arg-type]
    assert times.shape == (7, 2)
    assert [session.runs for session in sessions] == [21, 21]
    short = interleaved_ms(sessions, visits=10**6, calls=1, max_seconds=0, rng=random.Random(0))  # type: ignore[arg-type]
    assert len(short) == 5


def test_bfloat16_is_exported_and_its_lack_on_the_cpu_is_said_in_one_line(model):
    with pytest.raises(CannotRun, match=r"CPUExecutionProvider does not run bf16: .*Conv") as caught:
        BACKENDS["onnxruntime-cpu"].open(model, "bf16", 1)
    assert "\n" not in str(caught.value)
    file = model.onnx_file("bf16")
    assert weight_types(file) == {onnx.TensorProto.BFLOAT16}
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run .*bf16.onnx: .*Conv.*; export it as fp32"):
        onnx_logits(file, np.zeros((1, 3, 16, 16), np.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize("name", ["torch-cuda", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "tensorrt-graph"])
def test_backends_without_a_gpu_say_so(model, name):
    for attempt in (BACKENDS[name].describe, lambda: BACKENDS[name].open(model, "fp32", 1)):
        with pytest.raises(CannotRun, match=r"no CUDA|is not installed; pip install bsnas\[tensorrt"):
            attempt()


def test_a_missing_package_names_its_extra():
    with pytest.raises(
        CannotRun, match=r"tensorrt_none is not installed; pip install bsnas\[tensorrt-none\] brings it"
    ):
        import_package("tensorrt_none")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
@pytest.mark.parametrize("target", RTX_TARGETS)
def test_rtx_engines_are_built_ahead_of_time_for_every_target(model, target):
    trt = import_package("tensorrt_rtx")
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.network.modules())
    for precision in ("fp32", "fp16", "int8", *(() if target == "SM75" else ("bf16",))):
        file = model.onnx_file(precision)
        engine = build_engine(trt, file.read_bytes(), (1, 8, 32), target)
        assert len(engine.content) > 10_000
        assert len(engine.layers) > convolutions
        nodes = {node.name for node in onnx.load(file).graph.node if node.op_type == "Conv"}
        assert len(nodes) == convolutions + 1, "the classifier is one, too"
        assert nodes <= {operator for layer in engine.layers for operator in layer.operators}


def test_the_builders_layers_are_read_with_the_operators_fused_into_them():
    line = (
        "Name: __myl_Cast_myl0_1, LayerType: kgen, Inputs: [ { Name: images, Dimensions: [-1,3]}], Outputs: [], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: conv_1][ONNX Layer: clip_2]"
    )
    assert EngineLayer.parse(line) == ("kgen", "__myl_Cast_myl0_1", ("conv_1", "clip_2"))
    assert EngineLayer.parse("Name: a, LayerType: shape_call, Metadata: ") == ("shape_call", "a", ())
    assert EngineLayer.parse(" Name: images, IOMode: Input, DataType: Float") is None


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_an_engine_that_does_not_build_gives_the_builders_reason(model):
    trt = import_package("tensorrt_rtx")
    with pytest.raises(CannotRun, match=r"the engine does not build: .*b16"):
        build_engine(trt, model.onnx_file("bf16").read_bytes(), (1, 1, 1), "SM75")
    with pytest.raises(CannotRun, match=r"the ONNX file is not understood by tensorrt_rtx \d\S+: "):
        build_engine(trt, b"no such thing", (1, 1, 1), "SM80")


class StandInBuilder(SimpleNamespace):
    """What `build_engine` needs of TensorRT: a parser that may refuse, a timing cache that may not fit the GPU."""

    def __init__(self, *, understands: bool = True, fits: Callable[[bytes], bool] = lambda known: True) -> None:
        self.flags = {"TF32"}
        self.kept = None

        def create_timing_cache(known: bytes) -> SimpleNamespace | None:
            return SimpleNamespace(known=known, serialize=lambda: known + b"+") if known != b"torn" else None

        def set_timing_cache(cache, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch
            if fits(cache.known):
                self.kept = cache
            return fits(cache.known)

        config = SimpleNamespace(
            clear_flag=self.flags.discard, add_optimization_profile=lambda profile: None,
            create_timing_cache=create_timing_cache, set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: self.kept,
        )  # fmt: skip
        images = SimpleNamespace(name="images", shape=(-1, 3, 16, 16))
        builder = SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(get_input=lambda index: images),
            create_builder_config=lambda: config,
            create_optimization_profile=lambda: SimpleNamespace(set_shape=lambda *shapes: None),
            build_serialized_network=lambda network, config: b"engine",
        )
        parser = SimpleNamespace(
            parse=lambda content: understands, num_errors=1,
            get_error=lambda index: SimpleNamespace(desc=lambda: "No importer registered\nfor version 22 of Conv"),
        )  # fmt: skip
        super().__init__(
            __name__="tensorrt", __version__="10.0.1", ILogger=type("ILogger", (), {"ERROR": 1}),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1), BuilderFlag=SimpleNamespace(TF32="TF32"),
            ProfilingVerbosity=SimpleNamespace(DETAILED=1),
            Builder=lambda logger: builder, OnnxParser=lambda network, logger: parser,
        )  # fmt: skip


def test_a_parser_too_old_for_the_file_says_so_in_one_line(model):
    content = model.onnx_file("bf16").read_bytes()
    expected = "the ONNX file is not understood by tensorrt 10.0.1, opset 22: No importer registered"
    with pytest.raises(CannotRun) as caught:
        build_engine(StandInBuilder(understands=False), content, (1, 1, 1))  # type: ignore[arg-type]
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("before", "fits", "after"),
    [
        (None, lambda known: True, b"+"),
        (b"timings", lambda known: True, b"timings+"),
        (b"of another GPU", lambda known: not known, b"+"),
        (b"torn", lambda known: True, b"+"),
        (b"timings", lambda known: False, b"timings"),
    ],
    ids=["none yet", "extended", "refused and begun anew", "unreadable and begun anew", "refused altogether"],
)
def test_a_refused_timing_cache_does_not_end_the_build(tmp_path, before, fits, after):
    file = tmp_path / "timings.cache"
    if before is not None:
        file.write_bytes(before)
    trt = StandInBuilder(fits=fits)
    engine = build_engine(trt, b"", (1, 1, 1), timing_cache=file)  # type: ignore[arg-type]
    assert engine.content == b"engine"
    assert file.read_bytes() == after
    assert not trt.flags, "fp32 is not TF32"


class StandInEngine:
    def __init__(self) -> None:
        self.asked = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="LAZY")

    def create_runtime_config(self) -> SimpleNamespace:
        return self.asked

    def create_execution_context(self, config=None) -> str:
        return "as it is" if config is None else config.dynamic_shapes_kernel_specialization_strategy


def test_kernels_for_the_shape_are_waited_for_where_the_package_makes_them_later():
    strategies = SimpleNamespace(LAZY="LAZY", EAGER="EAGER", NONE="NONE")
    rtx = SimpleNamespace(DynamicShapesKernelSpecializationStrategy=strategies)
    assert execution_context(rtx, StandInEngine()) == "EAGER"  # type: ignore[arg-type]
    assert execution_context(SimpleNamespace(), StandInEngine()) == "as it is"  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_the_package_has_the_names_that_the_stand_ins_have():
    trt = import_package("tensorrt_rtx")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
    assert hasattr(trt.ICudaEngine, "create_runtime_config")
    assert hasattr(trt.IBuilderConfig, "get_timing_cache")
    assert hasattr(trt.BuilderFlag, "TF32")
