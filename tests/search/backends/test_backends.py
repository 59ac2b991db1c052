"""Every backend that runs here answers like torch; every other says why it does not."""

import importlib.util
import random

import numpy as np
import onnx
import pytest
import torch

from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.onnx import onnx_logits, torch_logits
from bsnas.engine.space.sampling import uniform_arch
from bsnas.search.backends import BACKENDS, CannotRun, Model, session_logits
from bsnas.search.backends.tensorrt import RTX_TARGETS, EngineLayer, build_engine, import_package
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
    with pytest.raises(CannotRun, match="the ONNX file is not understood"):
        build_engine(trt, b"no such thing", (1, 1, 1), "SM80")
