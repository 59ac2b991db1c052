"""evolve.py, export.py and latency.py on a run directory: results, files, continuation, and errors of the user."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

import bsnas.benchmarks.latency
import bsnas.engine.export
from bsnas.benchmarks.latency import LatencyArguments
from bsnas.benchmarks.parts.timing.latency_report import show
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process
from bsnas.engine.host.errors import UserError
from bsnas.engine.networks.subnet import Subnet
from bsnas.engine.release.released import inherited, retrained
from bsnas.engine.release.saved_network import save_network
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import Limit
from bsnas.search.algorithms.evolution import EvolutionConfig
from bsnas.search.evolve import EvolveArguments
from bsnas.search.runs.history import History
from bsnas.search.runs.search_run import search_run
from tests import script
from tests.search.runs import small_space, untrained_run

ALONE = Process(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SMALL = EvolutionConfig.scaled(population=6, iterations=2, seed=0)
LIMITS = (Limit("macs", high=40_000),)
ARCH = "c8:k5t3,k3t3_c8:k5t2,k7t3"


@pytest.fixture
def trained(tmp_path) -> TrainedRun:
    untrained_run(tmp_path / "run")
    return TrainedRun.open(tmp_path / "run", ALONE)


def read(file: Path):
    return json.loads(file.read_text())


def test_evolve_writes_figures_best_front_and_all_evaluations(tmp_path):
    untrained_run(tmp_path / "run")
    done = script(
        "search/evolve.py",
        *("--run", "run", "--max-macs", "40K", "--max-params", "4K", "--population", "6", "--iterations", "2"),
        *("--json", "out/figures.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    figures = read(tmp_path / "out" / "figures.json")
    assert figures["evaluations"] == 18
    assert figures["reused"] == 0
    best = figures["best"]
    assert best["macs"] <= 40_000
    assert best["params"] <= 4000
    assert best["arch"] in done.stdout
    assert "generation 2/2" in done.stdout
    folder = tmp_path / "run" / "search"
    assert read(folder / "best.json")["arch"] == best["arch"]
    front = read(folder / "pareto.json")
    assert front[-1]["top1"] == best["top1"]
    (history,) = (file for file in folder.iterdir() if file.name not in ("best.json", "pareto.json"))
    rows = [row for generation in read(history)["generations"] for row in generation]
    assert len({row["arch"] for row in rows}) == 18
    assert max(row["top1"] for row in rows) == best["top1"]


def test_a_search_by_loss_finds_the_network_with_the_least_and_is_kept_apart(trained):
    by_top1 = search_run(trained, LIMITS, SMALL, None)
    by_loss = search_run(trained, LIMITS, SMALL, None, score="loss")
    assert by_loss["file"] != by_top1["file"]
    rows = [row for file in (by_loss, by_top1) for rows in read(Path(file["file"]))["generations"] for row in rows]
    assert by_loss["best"]["arch"] == min(rows, key=lambda row: row["loss"])["arch"]
    front = read(trained.run.front_file)
    assert [row["loss"] for row in front] == sorted((row["loss"] for row in front), reverse=True)
    assert search_run(trained, LIMITS, SMALL, None, score="loss") == {**by_loss, "reused": by_loss["evaluations"]}


@pytest.mark.parametrize("options", [{"confidence": 0.99}, {"objectives": ("top1", "macs")}])
def test_a_search_by_loss_compares_no_accuracies(trained, options):
    with pytest.raises(UserError, match="a search by loss with --confidence or several --objectives"):
        search_run(trained, LIMITS, SMALL, None, score="loss", **options)


def test_a_killed_search_goes_on_and_ends_like_an_uninterrupted_one(trained, tmp_path, monkeypatch):
    whole_run = untrained_run(tmp_path / "whole")
    whole = search_run(TrainedRun.open(whole_run.path, ALONE), LIMITS, SMALL, None)

    save = History.save

    def killed(self, generations):
        save(self, generations)
        if len(generations) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(History, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        search_run(trained, LIMITS, SMALL, None)
    monkeypatch.undo()
    assert not (trained.run.search / "best.json").exists()
    continued = search_run(trained, LIMITS, SMALL, None)
    assert continued["reused"] == 12
    assert continued["best"] == whole["best"]
    for file in whole_run.search.iterdir():
        assert (trained.run.search / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_finished_search_is_returned_and_other_limits_take_what_is_known(trained, capsys):
    first = search_run(trained, LIMITS, SMALL, None)
    capsys.readouterr()
    again = search_run(trained, LIMITS, SMALL, None)
    assert again == {**first, "reused": first["evaluations"]}
    assert "generation" not in capsys.readouterr().out
    wider = search_run(trained, (Limit("macs", high=41_000),), SMALL, None)
    assert wider["file"] != first["file"]
    assert wider["best"]["top1"] >= first["best"]["top1"], "what an earlier search found inside the limits counts"
    assert len(list(trained.run.search.iterdir())) == 4


def test_another_seed_or_batchnorm_mode_is_another_search(trained):
    running = search_run(trained, (), SMALL, "running")
    seeded = search_run(trained, (), replace(SMALL, seed=1), "running")
    recalibrated = search_run(trained, (), SMALL, "recalibrate")
    assert len({running["file"], seeded["file"], recalibrated["file"]}) == 3
    assert recalibrated["reused"] == 0, "scores of other statistics are not comparable"


def test_a_damaged_history_is_named(trained):
    found = search_run(trained, LIMITS, SMALL, None)
    Path(found["file"]).write_text('{"generations": [[{"arch": "c1"}]]}')
    with pytest.raises(UserError, match=r"macs-40K-seed0-.*json holds no search of this program .*; remove it"):
        search_run(trained, LIMITS, SMALL, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_macs": "10K"}, "no architecture has macs <= 10K; reachable in this space: macs 19.456K to 61.44K"),
        ({"max_macs": "lots"}, "'lots' is not a count; write a positive number as 465M"),
        ({"max_macs": "1M", "min_macs": "2M"}, "macs from 2M to 1M is empty"),
        ({"population": 0}, "population and parents must be at least 1"),
    ],
)
def test_impossible_requests_are_told_before_anything_is_written(trained, options, message):
    arguments = EvolveArguments(run=trained.run.path, **options)

    def request():
        search_run(trained, arguments.limits(), arguments.evolution(), None)

    with pytest.raises(UserError, match=message):
        request()
    assert not trained.run.search.exists()


def test_errors_end_in_one_line_and_exit_code_2(tmp_path):
    done = script("search/evolve.py", "--run", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "nowhere holds no run (config.json is missing)" in last
    assert "Traceback" not in done.stderr


def test_there_must_be_a_network_to_export_or_time(trained):
    for arch, message in (
        (None, "holds no retrained network; train one with engine/retrain.py, or give --arch"),
        ("c9", "architecture 'c9' does not parse at 'c9'"),
        (ARCH.replace("c8", "c9"), "cluster 1 of architecture .* has 9 channels; allowed are 4, 6, 8"),
    ):
        with pytest.raises(UserError, match=message):
            _ = retrained(trained.run) if arch is None else inherited(trained.run, arch)


def test_a_run_without_checkpoint_is_refused(tmp_path):
    run = untrained_run(tmp_path / "run")
    for file in run.checkpoints.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"holds no checkpoint yet; train it first with engine/train.py --run"):
        TrainedRun.open(run.path, ALONE)


def in_process(module, monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    module.main()


def retrained_run(path: Path) -> RunDir:
    run = untrained_run(path)
    torch.manual_seed(1)
    save_network(run.retrain.network_file, Subnet(small_space(), Arch.parse(ARCH)).eval())
    return run


def test_export_writes_the_retrained_network_and_checks_it_on_test_images(tmp_path, monkeypatch, capsys):
    run = retrained_run(tmp_path / "run")
    in_process(bsnas.engine.export, monkeypatch, "--run", str(run.path), "--json", str(tmp_path / "f.json"))
    figures = read(tmp_path / "f.json")
    assert figures["weights"] == "retrained"
    assert figures["arch"] == ARCH
    assert figures["max_abs_error"] < 1e-5
    assert figures["top1_agreement"] == 1.0
    assert figures["top1_onnx"] == figures["top1_torch"]
    assert figures["images"] > 300, "digits' test set, not its search-validation set"
    assert Path(figures["file"]).stat().st_size == figures["bytes"]
    metadata = {entry.key: entry.value for entry in onnx.load(figures["file"]).metadata_props}
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert (metadata["arch"], metadata["weights"], metadata["resize"]) == (ARCH, "retrained", "null")
    assert "top-1 agreement 100.00%" in capsys.readouterr().out


def test_export_writes_a_file_per_precision_and_says_what_each_loses(tmp_path, monkeypatch, capsys):
    run = retrained_run(tmp_path / "run")
    arguments = ("--run", str(run.path), "--precision", "fp16", "bf16", "int8", "--json", str(tmp_path / "f.json"))
    in_process(bsnas.engine.export, monkeypatch, *arguments)
    files = {figures["precision"]: figures for figures in read(tmp_path / "f.json")["files"]}
    assert files.keys() == {"fp16", "bf16", "int8"}
    assert files["bf16"]["checked_by"] == "torch in bf16"
    for figures in files.values():
        lost = 100 * (figures["top1_torch"] - figures["top1_onnx"])
        assert figures["top1_points_lost"] == pytest.approx(lost)
        assert Path(figures["file"]).is_file()
    assert capsys.readouterr().out.count("wrote ") == 3


def test_latency_has_a_row_or_a_reason_for_every_backend(tmp_path, monkeypatch, capsys):
    run = retrained_run(tmp_path / "run")
    in_process(
        bsnas.benchmarks.latency,
        monkeypatch,
        *("--run", str(run.path), "--batch-sizes", "1", "4", "--precisions", "fp32", "bf16", "--repeats", "20"),
        *("--warmup-seconds", "0", "--targets", "SM80", "--profile"),
        *("--json", str(tmp_path / "f.json")),
    )
    figures = read(tmp_path / "f.json")
    rows = {(row["backend"], row.get("batch")): row for row in figures["rows"] if row.get("precision") != "bf16"}
    for backend in ("torch-cpu", "onnxruntime-cpu"):
        for batch in (1, 4):
            row = rows[backend, batch]
            assert row["max_abs_error"] < 1e-5
            assert row["top1_agreement"] == 1.0
            assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
            assert {"hardware", "date", "commit", "images_per_s", "precision"} <= row.keys()
    assert {backend for backend, _ in rows} == set(bsnas.benchmarks.latency.BACKENDS)
    assert all(("why" in row) != ("p50_ms" in row) for row in figures["rows"])
    refused = [row for row in figures["rows"] if (row["backend"], row.get("precision")) == ("onnxruntime-cpu", "bf16")]
    assert [row["batch"] for row in refused] == [1], "said once, not for every batch size"
    assert read(run.latency / "latency.json") == figures
    lines = (run.latency / "latency.csv").read_text().splitlines()
    assert len(lines) == 1 + len(figures["rows"])
    assert {"network", "p50_ms", "engine_bytes", "memory_mib", "macs"} <= set(lines[0].split(","))
    macs = {row["macs"] for row in figures["rows"] if "macs" in row}
    assert macs == {CostModel(small_space()).macs(Arch.parse(ARCH))}
    assert (run.latency / "latency.png").read_bytes().startswith(b"\x89PNG")
    profile = (run.latency / "profile-retrained-onnxruntime-cpu-fp32-b4.csv").read_text()
    assert profile.startswith("layer,ms")
    assert "Conv " in profile
    printed = capsys.readouterr().out
    for row in figures["rows"]:
        assert row.get("why", "images/s") in printed
    for built in figures["engines"]:  # where tensorrt-rtx is installed
        layers = read(Path(built["file"]).with_suffix(".layers.json"))
        assert len(layers) == built["layers"] > 10
        assert layers[0].keys() == {"kind", "name", "operators"}
        assert Path(built["file"]).stat().st_size == built["bytes"]


def test_a_busy_machine_is_told(capsys):
    row = {"network": "n", "backend": "torch-cpu", "precision": "fp32", "batch": 1, "images_per_s": 1.0, "macs": 1}
    row |= {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "engine_bytes": 1, "max_abs_error": 0.0, "top1_agreement": 1.0}
    show([{**row, "slowdown": 1.05}], [])
    assert "busy" not in capsys.readouterr().out
    show([{**row, "slowdown": 1.05}, {**row, "slowdown": 1.3}, {**row, "slowdown": 1.2}], [])
    assert "the median row took 1.20 times what it took in its fastest pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ("tflite",)}, "backends tflite unknown; allowed are torch-cpu"),
        ({"peers": ("resnet9",)}, "peers resnet9 unknown; allowed are mobilenet_v2"),
        ({"targets": ("SM90",)}, "targets SM90 unknown; allowed are SM75"),
        ({"batch_sizes": (0,)}, "batch sizes, repeats, passes, images and threads must be at least 1"),
        ({"batch_sizes": ()}, "batch sizes, repeats, passes, images and threads must be at least 1"),
        ({"precisions": ()}, "and precisions given"),
        ({"max_seconds": 0.0}, "at most 0.0 s: give at least 0 and more than 0"),
    ],
)
def test_latency_refuses_what_it_does_not_know(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        LatencyArguments(run=tmp_path, **options)


def test_an_exported_network_is_served_without_torch(tmp_path, monkeypatch):
    run = retrained_run(tmp_path / "run")
    in_process(bsnas.engine.export, monkeypatch, "--run", str(run.path), "--json", str(tmp_path / "e.json"))
    arguments = ("--run", str(run.path), "--json", str(tmp_path / "f.json"))
    done = script("benchmarks/serve_check.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    figures, exported = read(tmp_path / "f.json"), read(tmp_path / "e.json")
    assert figures["torch_imported"] is False
    assert figures["images"] == exported["images"]
    assert figures["images_per_s"] > 0
    assert abs(figures["top1"] - exported["top1_onnx"]) < 0.03, "Pillow's pixels are nearly DALI's"
    assert "-> " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --run DIR, or both --model FILE and --images"),
        (("--run", "."), "holds no exported network; run engine/export.py"),
        (("--model", "no.onnx", "--images", "."), "no.onnx does not exist"),
    ],
)
def test_serving_says_what_is_missing(tmp_path, arguments, message):
    done = script("benchmarks/serve_check.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
