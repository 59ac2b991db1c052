"""The latency table: its files, its parts, the fit of its correction, and what it refuses."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bsnas.search.latency
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.onnx import OnnxFormat, compare_logits, export_onnx, onnx_logits, torch_logits
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.sampling import uniform_arch
from bsnas.search.backends.plain_onnx import write_plain_onnx
from bsnas.search.latency import LatencyTableArguments, measure_table
from bsnas.search.latency_tables.bench import LatencyBench, base_ms
from bsnas.search.latency_tables.fit import FORMS, best_fit, errors_of, kendall_tau
from bsnas.search.latency_tables.model import LatencyModel, PartCost, find_model, refuse_other_device
from bsnas.search.latency_tables.network_parts import PartTable
from bsnas.search.latency_tables.part_stacks import stack, unit_scale
from bsnas.search.latency_tables.timings import LatencyContext, Timing, TimingStore
from tests.search.runs import small_space, untrained_run
from tests.search.spaces import all_archs, random_space

CONTEXT = LatencyContext(
    backend="torch-cpu", device="a CPU, 1 threads", versions="torch 1", batch=1, precision="fp32", reference="r"
)


def test_plain_files_hold_the_operators_that_the_exporter_writes_and_answer_like_torch(tmp_path):
    space = small_space()
    network = unit_scale(Subnet(space, uniform_arch(space, random.Random(3))))
    write_plain_onnx(network, tmp_path / "plain.onnx", input_shape=(3, 16, 16))
    export_onnx(network, tmp_path / "exported.onnx", OnnxFormat(resolution=16))
    plain, exported = (
        Counter("Reshape" if node.op_type == "Flatten" else node.op_type for node in onnx.load(file).graph.node)
        for file in (tmp_path / "plain.onnx", tmp_path / "exported.onnx")
    )
    assert plain == exported
    images = torch.randn(7, 3, 16, 16)
    expected = torch_logits(network, images)
    assert expected.std() > 1e-3
    parity = compare_logits(onnx_logits(tmp_path / "plain.onnx", images.numpy()), expected)
    assert parity == (7, pytest.approx(0, abs=1e-5), 1.0)
    for precision in ("fp16", "bf16"):
        write_plain_onnx(network, tmp_path / "half.onnx", input_shape=(3, 16, 16), precision=precision)
        onnx.checker.check_model(onnx.load(tmp_path / "half.onnx"), full_check=True)


def test_what_plain_files_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="Sigmoid is not written by write_plain_onnx; use export_onnx"):
        write_plain_onnx(torch.nn.Sequential(torch.nn.Sigmoid()), tmp_path / "x.onnx", input_shape=(3, 4, 4))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**9).map(random.Random))
def test_all_parts_are_those_of_all_architectures(rng):
    space = random_space(rng, max_architectures=300)
    table = PartTable(space)
    listed = table.all_parts()
    assert len(set(listed)) == len(listed)
    assert set(listed) == {part for arch in all_archs(space) for part in table.parts(arch)}


def test_stacks_have_the_widths_and_shortcuts_of_released_networks():
    space = small_space()
    table = PartTable(space)
    arch = uniform_arch(space, random.Random(1))
    network = Subnet(space, arch)
    for part, block in zip(table.parts(arch)[1:-1], network.blocks, strict=True):
        (copy,) = [m for m in stack(part, 1).modules() if type(m) is type(block)]
        assert copy.plan == block.plan
        assert [p.shape for p in copy.parameters()] == [p.shape for p in block.parameters()]
    for part in (table.parts(arch)[0], table.parts(arch)[-1]):
        one, three = (sum(p.numel() for p in stack(part, n).parameters()) for n in (1, 3))
        assert three == 3 * one
        assert stack(part, 3)(torch.randn(2, *part.input_shape)).shape == (
            2,
            part.classes or part.plans[-1].layers[-1].outputs,
        )


def networks(parts: int, count: int, noise: float, seed: int = 0):
    """Random networks of a known latency: 0.3 + 1.1 x their parts, each part by a factor of its own."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(0.5, 2, parts)
    counts = rng.integers(0, 3, (count, parts)).astype(float)
    own = rng.normal(1, 0.08, parts)
    latencies = (0.3 + 1.1 * counts @ (values * own)) * rng.normal(1, noise, count)
    return values, counts, latencies


def test_the_correction_is_chosen_by_validation_and_predicts_unseen_networks():
    values, counts, latencies = networks(20, 150, noise=0.005)
    name, offset, costs, validated = best_fit(values, counts[:100], latencies[:100])
    assert validated.keys() == {form.name for form in FORMS}
    assert name.startswith("parts"), validated
    errors = errors_of((offset + counts[100:] @ costs).tolist(), latencies[100:].tolist())
    assert errors.mape < 0.01 < validated["affine"]
    assert errors.kendall_tau > 0.95
    assert errors.held_out == 50


def test_forms_free_what_they_say():
    values, counts, latencies = networks(5, 60, noise=0.0)
    offset, factors = FORMS[0].fit(values, counts, latencies)
    assert (offset, *factors) == pytest.approx((0, 1, 1, 1, 1, 1), abs=1e-4)
    exact = 0.5 + counts @ values
    offset, factors = next(form for form in FORMS if form.name == "offset").fit(values, counts, exact)
    assert (offset, *factors) == pytest.approx((0.5, 1, 1, 1, 1, 1), abs=1e-3)


def test_kendall_tau_is_scipys():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 9, 30).tolist(), rng.integers(0, 9, 30).tolist()
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall_tau([1, 1], [1, 2]) == 0


def test_timings_are_kept_by_context(tmp_path):
    store = TimingStore(tmp_path / "latency" / "timings.sqlite")
    timing = Timing(0.5, 0.1, 20, 1.5)
    store.save(CONTEXT, {"block": timing})
    assert store.load(CONTEXT) == {"block": timing}
    assert store.load(replace(CONTEXT, batch=2)) == {}
    store.close()
    (tmp_path / "other.sqlite").write_text("text")
    with pytest.raises(UserError, match=r"cannot use .*other.sqlite as the file of timings"):
        TimingStore(tmp_path / "other.sqlite")


def test_the_base_is_that_of_quiet_moments():
    assert base_ms([Timing(1, 0, 9, ms) for ms in (2.0, 1.0, 3.0)]) == 1.0
    assert base_ms([Timing(1, 0, 9, ms) for ms in [0.1] + [1.0] * 15 + [2.0] * 30]) == pytest.approx(1.0)


def small_table(run: Path, **changes) -> LatencyTableArguments:
    small = {"backend": "onnxruntime-cpu", "fit": 12, "held_out": 5, "visits": 5, "threads": 1}
    return LatencyTableArguments(run=run, **{**small, **changes})  # type: ignore[arg-type]


def test_a_table_is_measured_in_pieces_and_predicts(tmp_path, monkeypatch, capsys):
    run = untrained_run(tmp_path / "run")
    save = TimingStore.save
    saved: list[str] = []

    def killed(self, context, timings):
        save(self, context, timings)
        saved.extend(timings)
        if len(saved) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimingStore, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        measure_table(run, small_table(run.path))
    monkeypatch.setattr(TimingStore, "save", lambda self, c, t: (save(self, c, t), saved.extend(t)))
    figures = measure_table(run, small_table(run.path))
    assert len(saved) == len(set(saved)), "measured twice"
    assert figures["held_out"] == 5
    assert figures.keys() >= {"mape", "max_error", "kendall_tau", "backend", "device", "batch", "precision"}
    assert 0 < figures["mape"] <= figures["max_error"]
    off = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in figures["networks"]]
    assert (sum(off) / 5, max(off)) == (pytest.approx(figures["mape"]), pytest.approx(figures["max_error"]))
    assert "on 5 held-out networks" in capsys.readouterr().out

    model = LatencyModel.load(Path(figures["file"]))
    space = small_space()
    predict = model.cost(space)
    low, high = predict.range()
    predicted = [predict(arch) for arch in all_archs(space)]
    assert (low, high) == (pytest.approx(min(predicted)), pytest.approx(max(predicted)))
    assert 0 <= low < high
    assert all(cost.visits >= 5 and cost.timed_ms >= 0 for cost in model.parts.values())
    measured_again = len(saved)
    measure_table(run, small_table(run.path))
    assert len(saved) == measured_again
    measure_table(run, small_table(run.path, batch=2))
    assert len(saved) == 2 * measured_again, "another batch size is another table"


def test_a_shrunk_space_with_too_few_networks_is_measured_in_full(tmp_path):
    space = small_space()
    arch = uniform_arch(space, random.Random(0))
    single = space.with_live([[op] for op in arch.operations])
    measured, fitted, held_out = bsnas.search.latency.choose_networks(single, small_table(tmp_path))
    assert measured == space
    assert len({*fitted, *held_out}) == 17
    with pytest.raises(UserError, match="the live space has 1 architectures and 17 different ones are needed"):
        bsnas.search.latency.choose_networks(single, small_table(tmp_path, space="live"))


def model(space, **changes) -> LatencyModel:
    parts = {
        str(part): PartCost(ms=1.0, timed_ms=1.0, spread_ms=0.1, visits=9) for part in PartTable(space).all_parts()
    }
    fields = {"context": CONTEXT, "space": space.fingerprint, "correction": "sum", "offset_ms": 0.5, "parts": parts}
    return LatencyModel(**{**fields, "errors": {"mape": 0.01}, **changes})  # type: ignore[arg-type]


def test_models_are_saved_loaded_and_predict_the_sum(tmp_path):
    space = small_space()
    model(space).save(tmp_path / "model.json")
    loaded = LatencyModel.load(tmp_path / "model.json")
    assert loaded == model(space)
    assert loaded.cost(space)(uniform_arch(space, random.Random(0))) == 0.5 + 6
    damaged = json.loads((tmp_path / "model.json").read_text())
    damaged["parts"][next(iter(damaged["parts"]))]["ms"] = float("nan")
    for content in ({"parts": {}}, [], damaged):
        (tmp_path / "model.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"model.json holds no latency table"):
            LatencyModel.load(tmp_path / "model.json")


def test_tables_of_something_else_are_refused(tmp_path):
    space = small_space()
    with pytest.raises(UserError, match="measured for other clusters or another resolution"):
        model(replace(space, resolution=32)).cost(space)
    lacking = model(space)
    with pytest.raises(UserError, match="lacks 1 parts of this space, as stem"):
        replace(lacking, parts=dict(list(lacking.parts.items())[1:])).cost(space)
    with pytest.raises(UserError, match=r"than this: device a CPU, 1 threads and not a GPU; measure here with"):
        refuse_other_device(lacking, "a GPU", "torch 1", tmp_path / "t.json")
    with pytest.raises(UserError, match=r"than this: versions torch 1 and not torch 2; measure here with"):
        refuse_other_device(lacking, "a CPU, 1 threads", "torch 2", tmp_path / "t.json")
    refuse_other_device(lacking, "a CPU, 1 threads", "torch 1", tmp_path / "t.json")


def test_the_table_is_found_in_the_run_or_asked_for(tmp_path):
    space, run = small_space(), RunDir(tmp_path)
    with pytest.raises(UserError, match="the run has no latency table; measure one with"):
        find_model(run, None, {"batch": None})
    first = model(space)
    table = run.latency_table("torch-cpu", 1, "fp32")
    first.save(table)
    assert find_model(run, None, {"batch": 1})[1] == first
    with pytest.raises(UserError, match="has no latency table of batch 2"):
        find_model(run, None, {"batch": 2})
    asked = {"backend": "torch-cpu", "batch": 8, "precision": "fp16"}
    with pytest.raises(UserError, match=r"is of batch 1, not 8 and of precision fp32, not fp16; give the table"):
        find_model(run, table, asked)
    second = model(space, context=replace(CONTEXT, batch=8))
    second.save(run.latency_table("torch-cpu", 8, "fp32"))
    with pytest.raises(
        UserError, match=r"several latency tables \(model-torch-cpu-b1.*choose one with --latency-table"
    ):
        find_model(run, None, {})
    assert find_model(run, None, {"batch": 8})[1] == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "tflite"}, "backend 'tflite' is unknown; allowed are torch-cpu"),
        ({"batch": 0}, "batch, visits and threads must be at least 1"),
        ({"held_out": 1}, "at least 10 and 2 networks are needed"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        small_table(tmp_path, **options)


def test_a_backend_that_is_not_here_says_why(tmp_path):
    run = untrained_run(tmp_path / "run")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch-cuda cannot measure fp32 here: no CUDA device on this machine"):
            measure_table(run, small_table(run.path, backend="torch-cuda"))
    with pytest.raises(UserError, match="does not run bf16"):
        measure_table(run, small_table(run.path, precision="bf16"))
    assert LatencyBench.group > 1
