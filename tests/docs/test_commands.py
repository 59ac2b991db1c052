"""Commands in README and docs: those marked `run` are run on a tiny run, the others parsed by their scripts."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.launcher import runner
from PIL import Image

import bsnas.engine.host.script
from tests.docs.fenced import ROOT, Command, blocks, commands_to, script_and_options

SMALLER = {
    "engine/train.py": [
        *("--shrink.first-epochs", "1", "--shrink.interval-epochs", "1", "--shrink.keep", "9"),
        *("--shrink.models-per-operation", "1", "--optimizer.warmup-epochs", "0"),
        *("--evaluation.recalibration-images", "64", "--data.cache-dir", "cache"),
    ],
    "search/evolve.py": ["--population", "4", "--iterations", "1"],
    "engine/retrain.py": ["--epochs", "1"],
    "benchmarks/latency.py": [
        *("--batch-sizes", "1", "--precisions", "fp32", "--backends", "onnxruntime-cpu", "--repeats", "3"),
        *("--warmup-seconds", "0", "--targets", "SM80"),
    ],
}
"""Options that make a documented command quick. They come last, and the last of an option counts."""
RUN = commands_to("run")
CHECK = commands_to("check")
pytestmark = pytest.mark.timeout(1000)  # one fixture runs all commands


def make_images(root: Path) -> None:
    """Three classes of 40 training and 4 test images, told apart by colour."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("val", 4)):
        for label, name in enumerate(("apple", "leaf", "sky")):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, label] += 100
                Image.fromarray(pixels).save(root / part / name / f"{index}.jpg")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Command, dict[str, Any]]:
    """Every command marked `run` and its outcome, in the order of the pages, in one process and one directory."""
    where = tmp_path_factory.mktemp("docs")
    make_images(where / "mine")
    tasks = []
    for command in RUN:
        _, script, options = script_and_options(command)
        smaller = [] if "--resume" in options else SMALLER.get(script, [])
        tasks.append({"words": [script, *options, *smaller]})
    (where / "tasks.json").write_text(json.dumps(tasks))
    driver = [sys.executable, str(ROOT / "tests/docs/run_commands.py"), "tasks.json", "results.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HOME": str(where)}
    done = subprocess.run(driver, cwd=where, env=environment, capture_output=True, text=True, timeout=900)
    results = json.loads((where / "results.json").read_text()) if (where / "results.json").exists() else []
    assert results, done.stderr
    return dict(zip(RUN, results, strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN, ids=str)
def test_a_command_marked_run_runs(command: Command, outcomes: dict[Command, dict[str, Any]]) -> None:
    assert command in outcomes, "a command before it failed"
    outcome = outcomes[command]
    assert outcome["exit"] == 0, outcome["output"][-2000:]
    assert "Traceback" not in outcome["output"]


class Parsed(Exception):
    """The command line was understood; nothing was done."""


def stop(*_: Any) -> None:
    raise Parsed


@pytest.mark.parametrize("command", [*CHECK, *RUN], ids=str)
def test_a_command_is_understood_by_its_script(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's parser and the script's own; nothing is opened, so machines, images and runs may be missing."""
    monkeypatch.chdir(ROOT)
    if command.words[0] == "make":
        subprocess.run(["make", "--dry-run", *command.words[1:]], check=True, capture_output=True)
        return
    if command.words[0] == "bash":  # a script of ours that lists what it would do
        subprocess.run([*command.words, "--list"], check=True, capture_output=True)
        return
    launcher, script, options = script_and_options(command)
    if command.words[0] == "deepspeed":
        understood = runner.parse_args([*launcher, script, *options])
        assert understood.user_script == script
        if understood.hostfile.startswith("docs/"):
            assert runner.fetch_hostfile(understood.hostfile)
    module = importlib.import_module("bsnas." + script.removesuffix(".py").replace("/", "."))
    parse_args = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(bsnas.engine.host.script, "use_options", stop)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: stop(parse_args(parser)))
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(Parsed):
        module.main()


def test_python_blocks_marked_run_run(outcomes: dict[Command, dict[str, Any]], tmp_path: Path) -> None:
    """On networks that the commands before them have written."""
    where = Path(next(iter(outcomes.values()))["directory"])
    code = [block.text for block in blocks() if block.language == "python" and block.what == "run"]
    assert len(code) >= 2
    for text in code:
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=where, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_every_block_says_what_a_test_does_with_it() -> None:
    for block in blocks():
        assert block.what in ("run", "check", "shown"), f"{block.page}:{block.line}"
    assert len(RUN) >= 15
    assert len(CHECK) >= 20


@pytest.mark.parametrize(("first", "tasks"), [(True, ["--preset", "imagenet"]), (False, ["--resume"])])
def test_the_slurm_script_starts_continues_and_queues_again(tmp_path: Path, first: bool, tasks: list[str]) -> None:
    """With stand-ins for Slurm's programs and for python: what each process would be told."""
    tools = tmp_path / "tools"
    tools.mkdir()
    stand_ins = {
        "scontrol": 'echo "scontrol $*" >> log; [ "$1" = show ] && printf "node1\\nnode2\\n" || true',
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@"; done; exit 75',
    }
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*" >> log'
    for file, text in {
        **{tools / name: text for name, text in stand_ins.items()},
        tmp_path / ".venv/bin/python": python,
    }.items():
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    if not first:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.json").write_text("{}")
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]",
        "RUN": "run", "DATA": "images",
    }  # fmt: skip
    done = subprocess.run(["bash", str(ROOT / "docs/slurm.sh")], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 75
    log = (tmp_path / "log").read_text().splitlines()
    told = [line for line in log if "engine/train.py" in line]
    assert [line.split(" engine")[0] for line in told] == ["0/2 0 node1:20007", "1/2 1 node1:20007"]
    assert all(" ".join(tasks) in line for line in told)
    assert log[-1] == "scontrol requeue 7"
