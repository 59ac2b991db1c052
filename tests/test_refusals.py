"""Arguments, files and machines that are refused, each in a line that says what is wrong and what to do."""

import subprocess
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import bsnas.search.backends.onnx_runtime as onnx_runtime
import bsnas.search.backends.tensorrt as tensorrt
from bsnas.benchmarks import early_decisions, ranking
from bsnas.benchmarks.demo import DemoArguments, run_pipeline
from bsnas.benchmarks.evaluation import EvaluationArguments
from bsnas.benchmarks.latency import LatencyArguments
from bsnas.benchmarks.loader import LoaderArguments
from bsnas.benchmarks.parts.scoring.case import trained_supernet
from bsnas.benchmarks.parts.scoring.plot import CONTENDERS, plot
from bsnas.benchmarks.search_quality import QualityArguments
from bsnas.benchmarks.serve_check import ServeArguments, Server, image_files, images_of_run
from bsnas.benchmarks.soak import SoakArguments
from bsnas.engine.config import RetrainConfig
from bsnas.engine.evaluation.counting import TreeCounter
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.memory import MIB
from bsnas.engine.evaluation.recalibration import TreeStatistics
from bsnas.engine.evaluation.store import EvaluationStore
from bsnas.engine.export import ExportArguments
from bsnas.engine.host.console import ConsoleOptions
from bsnas.engine.host.errors import UserError
from bsnas.engine.presets import preset
from bsnas.engine.release.onnx import onnx_logits
from bsnas.engine.retrain import _best_arch
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir, write_json
from bsnas.engine.space.arch import Operation
from bsnas.kernels import BlockShape, BlockWeights, choose_backend, inverted_residual, pointwise_bn_act, set_backend
from bsnas.search.backends.base import CannotRun
from bsnas.search.evolve import EvolveArguments
from bsnas.search.latency import LatencyTableArguments, time_missing
from bsnas.search.report import ReportArguments
from bsnas.search.runs.finalists import _hardware
from bsnas.search.runs.history import _generations
from tests.engine.evaluation.cases import random_images, small_space, trained_like_supernet
from tests.engine.tiny import ARCH, TINY, random_archs

RUN = Path("run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RetrainConfig(epochs=0),
            r"retraining with epochs 0, learning rate 0.045, batch size 512: each must be",
        ),
        (
            lambda: ConsoleOptions(quiet=True, verbose=True),
            r"--quiet and --verbose exclude each other; give one of them",
        ),
        (lambda: preset("cifar"), r"preset 'cifar' is unknown; allowed are digits"),
        (lambda: ExportArguments(run=RUN, images=0), r"images 0, batch None: both must be at least 1"),
        (lambda: ExportArguments(run=RUN, precision=()), r"--output names one file; give one --precision with it"),
        (lambda: ExportArguments(run=RUN, calibration_images=0), r"calibration images 0; at least 1 is needed"),
        (lambda: EvolveArguments(run=RUN, timeout_minutes=0), r"timeout 0 minutes; it must be above 0"),
        (lambda: ReportArguments(run=()), r"0 runs given; give --run once, or twice to compare two"),
        (lambda: ReportArguments(run=(RUN,), watch=0), r"--watch 0: give seconds above 0 and a single --run"),
        (lambda: LatencyTableArguments(run=RUN, backend="tpu"), r"backend 'tpu' is unknown; allowed are"),
        (lambda: LatencyArguments(run=RUN, peers=("vgg",)), r"peers vgg unknown; allowed are"),
        (lambda: ServeArguments(run=RUN, batch=0), r"batch, limit and threads must be at least 1"),
        (
            lambda: LoaderArguments(images=10, batch_size=64),
            r"10 images are too few for batches of 64; give at least tw",
        ),
        (
            lambda: QualityArguments(run=RUN, population=7),
            r"population 7: give a multiple of the \d+ budgets, at least 3x",
        ),
        (lambda: SoakArguments(kills=0), r"kills 0, terms 20, mutations 1000, gap 6.0, cold share 0.1: give counts of"),
        (lambda: SoakArguments(images=0), r"images 0: give at least 1"),
        (lambda: set_backend("cuda"), r"backend 'cuda' is unknown; allowed are .*; or force none"),
        (
            lambda: choose_backend(torch.ones(1), "triton"),
            r"backend 'triton' cannot run: .*; use 'reference', or force n",
        ),
        (lambda: Operation.parse("k3"), r"operation 'k3' does not parse; write kKERNELtEXPANSIONcCHANNELS"),
        (lambda: Evaluator(None, None, bn="none"), r"bn 'none' is unknown; allowed are run"),  # type: ignore[arg-type]
        (
            lambda: small_space().check(_with_channels(5)),
            r"cluster 1 of architecture .* has 5 channels; all",
        ),
    ],
)
def test_an_argument_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        make()


def _with_channels(channels: int) -> Any:
    (arch,) = random_archs(small_space(), 1)
    return replace(arch, channels=(channels, *arch.channels[1:]))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device cuda is not there; use --device cpu"):
        EvaluationArguments(device="cuda")


# ---- kernels


def test_shapes_that_do_not_fit_a_kernel() -> None:
    weights = BlockWeights(torch.ones(8, 4), torch.ones(8, 1, 3, 3), torch.ones(4, 8))
    norms = (nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(4))
    shape = BlockShape(4, 16, 4, 3, 1)
    with pytest.raises(
        ValueError, match=r"is no slice of weights .* for an input of 4 channels; allowed are widths up to"
    ):
        inverted_residual(torch.ones(1, 4, 5, 5), weights, norms, shape, training=True)
    with pytest.raises(
        ValueError, match=r"in_channels 3 with x .* and weight .*; x must have exactly that many channels"
    ):
        pointwise_bn_act(torch.ones(1, 4, 5, 5), torch.ones(8, 4), nn.BatchNorm2d(8), in_channels=3, training=True)


def test_a_norm_without_weights_is_not_for_triton() -> None:
    triton_block = pytest.importorskip("bsnas.kernels.gpu.block")
    with pytest.raises(
        ValueError, match=r"has no weights or no running statistics; the triton backend takes BatchNorm2d"
    ):
        triton_block.Norm.of(nn.BatchNorm2d(4, affine=False))


# ---- evaluation


def no_memory(*_: Any, **__: Any) -> None:
    raise RuntimeError("can't allocate memory: you tried to allocate 1 bytes")


def test_one_image_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeCounter, "_count_chunk", no_memory)
    evaluator = Evaluator(trained_like_supernet(small_space()), random_images(8))
    with pytest.raises(
        UserError, match=r"one image of 16 pixels does not fit in the memory of cpu; end other programs"
    ):
        evaluator.evaluate(random_archs(small_space(), 2))


def test_a_batch_of_recalibration_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TreeStatistics, "zeros", no_memory)
    evaluator = Evaluator(
        trained_like_supernet(small_space()),
        random_images(8),
        bn="recalibrate",
        recalibration=random_images(16, seed=1),
    )
    evaluator.memory = replace(evaluator.memory, activations=4 * MIB)
    with pytest.raises(
        UserError, match=r"a batch of 16 images does not fit in the memory of cpu; end other programs th"
    ):
        evaluator.evaluate(random_archs(small_space(), 2))


def test_early_decisions_take_running_statistics() -> None:
    from bsnas.engine.evaluation.early_decisions import Quotas

    evaluator = Evaluator(
        trained_like_supernet(small_space()),
        random_images(8),
        bn="recalibrate",
        recalibration=random_images(16, seed=1),
    )
    with pytest.raises(
        UserError, match=r"early decisions need bn running; evaluate all images to score with bn recalib"
    ):
        evaluator.place(random_archs(small_space(), 4), Quotas(best=1, worst=1))


# ---- files


def test_a_store_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"as the file of evaluations: .*; give a file that this program wrote, or a new n"
    ):
        EvaluationStore(tmp_path / "missing" / "evaluations.sqlite")


def test_a_configuration_that_is_none(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", [])
    with pytest.raises(UserError, match=r"config.json holds no configuration; restore it or start a new run"):
        RunFacts(tmp_path)


def test_a_run_without_a_search(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no search result; run search/evolve.py --run .* first, or give --arch"):
        _best_arch(RunDir(tmp_path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"top1": 2.0}, r"has a top-1, top-5 or cost that is impossible"),
        ({"macs": -1}, r"has a top-1, top-5 or cost that is impossible"),
        ({"loss": "low"}, r"has a value that is no number"),
        ({"arch": "c1:k3t3"}, r"holds no search of this program \(architecture c1:k3t3 has clusters of"),
    ],
)
def test_a_search_with_impossible_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    whole = {"arch": str(ARCH), "macs": 3, "top1": 0.5, "top5": 0.75, "loss": 1.0}
    assert len(_generations({"generations": [[whole]]}, tmp_path, TINY)) == 1
    with pytest.raises(UserError, match=message):
        _generations({"generations": [[{**whole, **row}]]}, tmp_path, TINY)


def test_a_split_with_too_few_images(tmp_path: Path) -> None:
    import json

    from bsnas.engine.data.dataset import DataConfig, open_dataset

    config = DataConfig(source="digits", resolution=16, val_per_class=2, cache_dir=str(tmp_path))
    data = open_dataset(config, tmp_path / "split.json")
    record = json.loads((tmp_path / "split.json").read_text())
    record["search_val"] = record["search_val"][:-1] + record["search_val"][:1]
    write_json(tmp_path / "split.json", record)
    with pytest.raises(UserError, match=r"split .* does not hold 2 images of each class; delete the split file"):
        open_dataset(config, tmp_path / "split.json")
    assert len(data.search_val) == 20


# ---- inference


def test_onnx_files_that_do_not_run(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    with pytest.raises(UserError, match=r"a.onnx does not exist; export a network with engine/export.py"):
        Server(file, 1, 1)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run .*; export it as fp32, or run it with TensorRT"):
        onnx_logits(file, np.zeros((1, 3, 4, 4), np.float32))
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run .*; export it as fp32, fp16 or int8"):
        Server(file, 1, 1)


def test_an_onnx_file_of_somebody_else(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["images"], ["logits"])], "g", value[:1], value[1:])
    file = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), file)
    with pytest.raises(
        UserError, match=r"a.onnx does not say its classes, input, mean, std; export it with engine/expo"
    ):
        Server(file, 1, 1)


def test_images_that_do_not_serve(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not say where its images are \(.*\); give --images"):
        images_of_run(tmp_path)
    server = object.__new__(Server)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image .*a.jpg cannot be decoded: .*; remove it or give other --images"):
        server._load(image_files([tmp_path])[0])


class FakeSession:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_onnx_runtime_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    (tmp_path / "a.onnx").write_bytes(b"nothing")
    model: Any = types.SimpleNamespace(onnx_file=lambda _: tmp_path / "a.onnx")
    (cpu,) = [b for b in _backends(onnx_runtime.OnnxRuntimeBackend) if b.device == "cpu"]
    with pytest.raises(CannotRun, match=r"CPUExecutionProvider does not run fp32: "):
        cpu.open(model, "fp32", 1)
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnx_runtime.OnnxRuntimeBackend, "describe", lambda _: "")
    gpu = onnx_runtime.OnnxRuntimeBackend("cuda")
    with pytest.raises(
        CannotRun, match=r"CUDAExecutionProvider did not start; onnxruntime fell back to CPUExecutionPro"
    ):
        gpu.open(model, "fp32", 1)


def _backends(kind: type) -> list[Any]:
    from bsnas.search.backends import BACKENDS

    return [backend for backend in BACKENDS.values() if type(backend) is kind]


def test_tensorrt_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        ERROR = 0
        __version__ = "1"
        ComputeCapability = types.SimpleNamespace(SM80=0)

        def __init__(self, *_: Any) -> None: ...

        Logger: Any = None
        Runtime: Any = None

        def deserialize_cuda_engine(self, _: bytes) -> None:
            return None

    Fake.Logger = Fake.Runtime = Fake
    fake: Any = Fake
    with pytest.raises(CannotRun, match="the engine that was built does not load on this GPU"):
        tensorrt.TensorRTSession(fake, b"", 1)
    session = object.__new__(tensorrt.TensorRTSession)
    session._context = types.SimpleNamespace(execute_async_v3=lambda _: False)  # type: ignore[assignment]
    session._stream = types.SimpleNamespace(cuda_stream=0)  # type: ignore[assignment]
    with pytest.raises(CannotRun, match="the engine failed while running"):
        session._launch()
    monkeypatch.setattr(tensorrt, "import_package", lambda _: Fake)
    monkeypatch.setattr(tensorrt, "require_cuda", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    (rtx,) = [b for b in _backends(tensorrt.TensorRTBackend) if b.package == "tensorrt_rtx" and not b.graph]
    with pytest.raises(CannotRun, match="TensorRT-RTX has no SM90, which H100 is"):
        rtx.describe()
    monkeypatch.undo()

    def broken(_: str) -> None:
        raise ImportError("libnvinfer.so: cannot open shared object file")

    monkeypatch.setattr(tensorrt.importlib, "import_module", broken)
    with pytest.raises(CannotRun, match=r"tensorrt does not load: libnvinfer.so"):
        tensorrt.import_package("tensorrt")


def test_a_latency_table_of_something_unknown() -> None:
    model: Any = types.SimpleNamespace(context=types.SimpleNamespace(backend="tpu"))
    with pytest.raises(UserError, match=r"the latency table is of unknown backend 'tpu'; allowed are"):
        _hardware(model)


def test_a_part_that_a_backend_does_not_run() -> None:
    class Bench:
        context = types.SimpleNamespace(backend="tensorrt")
        parts = types.SimpleNamespace(all_parts=lambda: ["stem"])
        group = 1

        def part(self, _: Any) -> None:
            raise CannotRun("no kernel")

    store = types.SimpleNamespace(load=lambda _: {}, save=lambda *_: None, close=lambda: None)
    with pytest.raises(UserError, match=r"tensorrt does not run a part of the networks: no kernel; choose another"):
        time_missing(Bench(), store, [])  # type: ignore[arg-type]


# ---- studies of a run


def test_a_run_without_shrink_steps_has_no_early_decisions_to_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir.create(tmp_path, preset("digits"))
    monkeypatch.setattr(early_decisions, "start_process", lambda: None)
    monkeypatch.setattr("sys.argv", ["early_decisions.py", "--run", str(tmp_path)])
    with pytest.raises(UserError, match=r"has made no shrink step yet; train it further, or give another --run"):
        early_decisions.main()


def test_a_space_too_small_for_a_ranking_study(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, preset("digits"))
    one = TINY.with_live([ops[:1] for ops in TINY.full().live])
    arguments = ranking.RankingArguments(run=tmp_path)
    process: Any = None
    with pytest.raises(UserError, match=r"the space after the shrink steps holds 1 architectures, fewer than the"):
        ranking._pool(run, arguments, process, one, ("newest", None))


# ---- make demo


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (75, r"the step train was stopped; the same command continues"),
        (2, r"the step train ended with exit code 2; its"),
    ],
)
def test_a_step_of_the_demo_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    class Step:
        pid = 0

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def wait(self) -> int:
            return code

    monkeypatch.setattr(subprocess, "Popen", Step)
    with pytest.raises((UserError, SystemExit), match=message):
        run_pipeline(DemoArguments(run=tmp_path / "run"))


def test_a_plot_of_another_kind_of_file_is_refused(tmp_path):
    row = {"space": "small", "models": 4, "images": 10, **dict.fromkeys(CONTENDERS, 1.0)}
    plot([row], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size
    with pytest.raises(UserError, match=r"plot .* cannot be written: .*; choose a .png or .svg file"):
        plot([row], tmp_path / "plot.docx")


def test_a_kept_supernet_of_a_benchmark_that_is_damaged_is_refused(tmp_path):
    def trained():
        return trained_supernet(1, 32, tmp_path, torch.device("cpu"), Console(quiet=True))

    first, again = trained(), trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    (file,) = tmp_path.glob("benchmark-supernet-*.pt")
    file.write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"kept supernet .* cannot be read: .*; remove it to train it again"):
        trained()
