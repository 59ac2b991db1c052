"""The result of a search does not depend on the number of processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.search.runs import untrained_run

OPTIONS = ("--max-macs", "45K", "--objectives", "top1,macs,params", "--population", "6", "--iterations", "2")


def searching(run: Path, rank: int, world: int, port: int, *options: str) -> subprocess.Popen[str]:
    """One process of a search, as DeepSpeed's launcher would start it."""
    processes = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "search/evolve.py"), "--run", str(run), *options],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in processes.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def search_with(run: Path, world: int, *options: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of every process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    processes = [searching(run, rank, world, port, *options) for rank in range(world)]
    told = [process.communicate(timeout=280) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, told, strict=True)]


def candidates(run: Path) -> list[dict]:
    """Every architecture that the only search of a run stored, in order."""
    (file,) = (file for file in (run / "search").iterdir() if file.name not in ("best.json", "pareto.json"))
    return [row for generation in json.loads(file.read_text())["generations"] for row in generation]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_find_what_one_finds(tmp_path):
    for world in (1, 2):
        run = untrained_run(tmp_path / str(world)).path
        results = search_with(run, world, *OPTIONS)
        assert [code for code, _, _ in results] == [0] * world, results
        assert "generation 2/2" in results[0][1]
        assert all(not out for _, out, _ in results[1:]), "the main process alone speaks"
    one, two = (candidates(tmp_path / str(world)) for world in (1, 2))
    assert len(one) == 18
    for a, b in zip(one, two, strict=True):
        assert b == {**a, "loss": pytest.approx(a["loss"], rel=1e-6)}
    for name in ("best.json", "pareto.json"):
        first, second = (json.loads((tmp_path / world / "search" / name).read_text()) for world in ("1", "2"))
        rows, others = ([found] if isinstance(found, dict) else found for found in (first, second))
        assert [row["arch"] for row in rows] == [row["arch"] for row in others]


@pytest.mark.slow
def test_two_processes_say_an_error_once(tmp_path):
    run = untrained_run(tmp_path / "run")
    results = search_with(run.path, 2, "--max-macs", "10K")
    assert [code for code, _, _ in results] == [2, 2]
    assert "no architecture has macs <= 10K" in results[0][2]
    assert "error" not in results[1][2]
