"""benchmarks/first_gpu_hour.sh with a stand-in for Python: arguments, limits, continuation, what is missing."""

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bsnas.engine.host.script
from bsnas.benchmarks import machine_check
from tests import ROOT

SCRIPT = ROOT / "benchmarks/first_gpu_hour.sh"
ALL_THERE = (
    "python", "torch", "disk", "gpu", "triton", "dali", "deepspeed", "onnxruntime", "tensorrt", "tensorrt-rtx",
    "pytest", "fashion-mnist",
)  # fmt: skip
PYTHON = """#!/bin/bash
# Notes what it is asked to run, and does as the files beside it say.
here=$(dirname "$0")
if [[ $1 == benchmarks/machine_check.py ]]; then cp "$here/machine.tsv" "${@: -1}"; exit; fi
echo "${BSNAS_CUDA_GRAPHS:-0} $*" >> "$here/asked"
line="$*"; [[ $line == *" --json "* ]] && json=${line#* --json } && echo "{}" > "${json%% *}"
for file in "$here"/fails-* "$here"/hangs-*; do
    what=$(basename "$file")
    [[ $* == *"${what#*-}"* ]] || continue
    [[ $what == hangs-* ]] && sleep 60
    echo "this is why" && exit 7
done
exit 0
"""


class Stage:
    """A directory with the stand-in, and the script's output in it."""

    def __init__(self, place: Path) -> None:
        self.place, self.output = place, place / "output"
        (place / "python").write_text(PYTHON)
        (place / "python").chmod(0o755)
        self.machine()

    def machine(self, **missing: str) -> None:
        """What is there: all but what is named, with the reason."""
        rows = [(name, "no", missing[name]) if name in missing else (name, "yes", "1.0") for name in ALL_THERE]
        (self.place / "machine.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))

    def command(self, *options: str) -> list[str]:
        return ["bash", str(SCRIPT), "--output", str(self.output), *options]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHON": str(self.place / "python"), "RESULTS": str(self.place / "results")}

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        (self.place / "asked").write_text("")
        command = self.command(*options)
        return subprocess.run(command, capture_output=True, text=True, env=self.environment, cwd=self.place, timeout=60)

    def asked(self) -> list[str]:
        return (self.place / "asked").read_text().splitlines()

    def outcomes(self) -> dict[str, str]:
        """Of the summary: a step, and what became of it."""
        lines = (self.output / "summary.txt").read_text().splitlines()
        return {line.split()[0]: line.split("  ", 1)[1].strip() for line in lines if "  " in line}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def test_the_help_and_the_list_run_nothing(tmp_path: Path) -> None:
    for option in ("--help", "--list"):
        done = subprocess.run(["bash", str(SCRIPT), option], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0
        assert done.stderr == ""
        assert list(tmp_path.iterdir()) == []
    listed = [line.split()[0] for line in done.stdout.splitlines()]
    assert listed[0] == "tests"
    assert listed.index("throughput") < listed.index("loader") < listed.index("tune") < listed.index("evaluation")
    assert listed.index("evaluation") < listed.index("train") < listed.index("export") < listed.index("latency")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--all"], "'--all' is unknown; allowed are --cpu, --output"),
        (["--only"], "--only needs a step; allowed are tests throughput"),
        (["--only", "--cpu"], "--only needs a step"),
        (["--redo", "training"], "step 'training' is unknown; allowed are tests throughput"),
        (["--patience", "0"], "patience '0'; give a number above 0"),
        (["--output"], "--output needs a value"),
    ],
)
def test_wrong_arguments_end_with_two(stage: Stage, options: list[str], message: str) -> None:
    done = subprocess.run(["bash", str(SCRIPT), *options], capture_output=True, text=True, env=stage.environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_all_steps_run_in_order_and_a_second_call_runs_none(stage: Stage) -> None:
    done = stage.run()
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = stage.outcomes()
    assert all("ended well" in outcome for outcome in outcomes.values())
    assert len(stage.asked()) == len(outcomes) >= 20
    assert [line for line in stage.asked() if line.startswith("1 ")] == [
        line for line in stage.asked() if "-graphs.json" in line
    ]
    assert all(str(stage.output) in line for line in stage.asked() if "kernels" not in line)
    again = stage.run()
    assert again.returncode == 0
    assert stage.asked() == []
    assert all(outcome.endswith("ended well before") for outcome in stage.outcomes().values())


def test_what_failed_is_repeated_and_what_ended_well_is_not(stage: Stage) -> None:
    (stage.place / "fails-search").touch()
    done = stage.run()
    assert done.returncode == 1
    assert "this is why" in done.stdout
    outcomes = stage.outcomes()
    assert f"FAILED with exit code 7; log in {stage.output}/evolve.log" in outcomes["evolve"]
    for name in ("retrain", "export", "latency"):
        assert "skipped: builds on" in outcomes[name]
    assert "ended well" in outcomes["early-decisions"]
    (stage.place / "fails-search").unlink()
    assert stage.run().returncode == 0
    again = [line.split()[1] for line in stage.asked()]
    assert again == ["search/evolve.py", "engine/retrain.py", "engine/export.py", *["benchmarks/latency.py"] * 2]


def test_redo_repeats_a_step_and_what_builds_on_it(stage: Stage) -> None:
    stage.run()
    (stage.output / "run/retrain").mkdir(parents=True)
    (stage.output / "run/config.json").touch()
    stage.run("--redo", "retrain", "loader")
    scripts = [line.split()[1] for line in stage.asked()]
    assert scripts == ["benchmarks/loader.py", "engine/retrain.py", "engine/export.py", *["benchmarks/latency.py"] * 2]
    assert not (stage.output / "run/retrain").exists()
    assert (stage.output / "run/config.json").exists()


def test_a_training_that_was_begun_is_continued(stage: Stage) -> None:
    (stage.place / "fails-train.py").touch()
    stage.run("--only", "images", "train")
    (stage.output / "run").mkdir()
    (stage.output / "run/config.json").touch()
    (stage.place / "fails-train.py").unlink()
    stage.run("--only", "train")
    (asked,) = stage.asked()
    assert "--resume" in asked
    assert "--preset" not in asked


def test_a_step_over_its_limit_is_named_and_the_next_goes_on(stage: Stage) -> None:
    (stage.place / "hangs-loader.py").touch()
    done = stage.run("--only", "loader", "tune", "--patience", "0.001")
    assert done.returncode == 1
    outcomes = stage.outcomes()
    assert "FAILED: over its limit of 0.6 s" in outcomes["loader"]
    assert "ended well" in outcomes["tune"]


@pytest.mark.parametrize(
    ("name", "skipped", "runs"),
    [
        ("dali", "train", "kernel-speed"),
        ("deepspeed", "throughput", "loader"),
        ("triton", "tune", "evaluation"),
        ("pytest", "tests", "tune"),
    ],
)
def test_what_is_missing_is_named_and_the_rest_runs(stage: Stage, name: str, skipped: str, runs: str) -> None:
    stage.machine(**{name: "not installed, or so"})
    done = stage.run()
    assert done.returncode == 0, "all that could run ended well"
    assert f"skipped: needs {name}: not installed, or so" in stage.outcomes()[skipped]
    assert "ended well" in stage.outcomes()[runs]


def test_either_tensorrt_will_do(stage: Stage) -> None:
    stage.machine(tensorrt="no tensorrt")
    stage.run("--cpu")
    assert "skipped: needs gpu: --cpu runs without one" in stage.outcomes()["latency-tensorrt"]
    shutil.rmtree(stage.output)
    stage.run()
    assert "ended well" in stage.outcomes()["latency-tensorrt"]
    shutil.rmtree(stage.output)
    stage.machine(**{"tensorrt": "no tensorrt", "tensorrt-rtx": "none either"})
    stage.run()
    assert "needs tensorrt: no tensorrt" in stage.outcomes()["latency-tensorrt"]


@pytest.mark.parametrize("name", ["torch", "disk", "gpu"])
def test_without_what_all_steps_need_nothing_starts(stage: Stage, name: str) -> None:
    stage.machine(**{name: "not here"})
    done = stage.run()
    assert done.returncode == 1
    assert f"error: no step can run without {name}: not here; --cpu tries the script" in done.stderr
    assert stage.asked() == []


def test_the_cpu_form_is_small_and_keeps_its_figures_apart(stage: Stage) -> None:
    stage.machine(gpu="none")
    done = stage.run("--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs gpu: --cpu runs without one" in stage.outcomes()["tune"]
    assert f"--results {stage.output}/kernel-speed.csv" in " ".join(stage.asked())
    assert "--device cuda" not in " ".join(stage.asked())
    stage.machine()
    done = stage.run()
    assert done.returncode == 2
    assert "holds figures of the other form" in done.stderr


class Parsed(Exception):
    """A command line was understood; nothing was done."""


def stop(*_: Any) -> None:
    raise Parsed


@pytest.mark.slow
def test_every_command_is_understood_by_its_script(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both forms, by the script's own parser."""
    asked = []
    for options in ([], ["--cpu"]):
        assert stage.run(*options).returncode == 0
        asked += [line.split()[1:] for line in stage.asked()]
        shutil.rmtree(stage.output)
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(bsnas.engine.host.script, "use_options", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: stop(parse_args(parser)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # an option for a GPU is refused without one
    scripts = [words for words in asked if words[0].endswith(".py")]
    assert len(scripts) >= 30
    for words in scripts:
        monkeypatch.setattr(sys, "argv", words)
        module = importlib.import_module("bsnas." + words[0].removesuffix(".py").replace("/", "."))
        with pytest.raises(Parsed):
            module.main()


def test_a_stopped_call_says_so_and_goes_on_later(stage: Stage) -> None:
    (stage.place / "hangs-loader.py").touch()
    (stage.place / "asked").write_text("")
    process = subprocess.Popen(
        stage.command("--only", "loader", "tune"), env=stage.environment, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not stage.asked() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert "STOPPED" in stage.outcomes()["loader"]
    (stage.place / "hangs-loader.py").unlink()
    assert stage.run("--only", "loader", "tune").returncode == 0


def test_the_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    for script in (SCRIPT, SCRIPT.with_name("first_gpu_hour_steps.sh")):
        done = subprocess.run(["shellcheck", "-x", str(script)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout


# ---- what the machine has


def test_a_package_that_is_missing_or_broken_is_a_row_with_the_reason(tmp_path: Path) -> None:
    row = machine_check.probed("deepspeed", "import no_such_package")
    assert row == ("deepspeed", False, "ModuleNotFoundError: No module named 'no_such_package'")
    row = machine_check.probed("dali", "import os; os._exit(9)")
    assert row == ("dali", False, "ended with exit code 9")
    assert machine_check.probed("torch", "print('noise'); print('1.2')") == ("torch", True, "1.2")


def test_a_package_that_hangs_is_a_row_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "SECONDS", 0.2)
    row = machine_check.probed("dali", "import time; time.sleep(60)")
    assert row == ("dali", False, "did not load within 0.2 s")


def test_too_little_disk_and_no_compiler_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_check, "DISK_GB", 1e9)
    assert not machine_check.disk(tmp_path / "not" / "there").there
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install gcc" in machine_check.compiler().what
    assert machine_check.driver() == ("driver", False, "nvidia-smi does not run")


def test_the_table_has_what_the_steps_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine_check, "PROBES", dict.fromkeys(machine_check.PROBES, "print('1.0')"))
    monkeypatch.setattr(sys, "argv", ["machine_check.py", "--place", ".", "--output", str(tmp_path / "machine.tsv")])
    machine_check.main()
    rows = [line.split("\t") for line in (tmp_path / "machine.tsv").read_text().splitlines()]
    assert {name for name, _, _ in rows} >= set(ALL_THERE)
    assert {there for _, there, _ in rows} <= {"yes", "no"}
    assert "dali" in capsys.readouterr().out
    listed = subprocess.run(["bash", str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout
    needs = {need for line in listed.splitlines() for need in line.split()[4].split(",")}
    assert needs <= set(ALL_THERE)


WITHOUT = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("nvidia.dali", "deepspeed"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
def test_gpu_tests_can_be_collected_without_dali_and_deepspeed(tmp_path: Path) -> None:
    """Files whose code needs one of the two are skipped with that reason; the others run."""
    (tmp_path / "without_packages.py").write_text(WITHOUT)
    marked = [str(file) for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark" + ".gpu" in file.read_text()]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-p", "without_packages", "-rs", "--collect-only"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *marked], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "test_gpu_scores_equal_a_plain_loop" in done.stdout
    assert "could not import 'nvidia.dali'" in done.stdout


def test_figures_of_a_gpu_are_kept_beside_the_other_results(stage: Stage) -> None:
    assert stage.run("--only", "loader").returncode == 0
    assert (stage.place / "results/loader.json").is_file()


def test_figures_of_a_cpu_stay_in_the_output(stage: Stage) -> None:
    assert stage.run("--cpu", "--only", "loader").returncode == 0
    assert (stage.output / "loader.json").is_file()
    assert not (stage.place / "results").exists()
