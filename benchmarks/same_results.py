"""Does a change leave every result as it was? A small digits pipeline on two commits, compared bit for bit.

    python benchmarks/same_results.py --against HEAD~1
    python benchmarks/same_results.py --against main --processes 2

Each trains, shrinks twice, evolves, retrains and exports in fp32, with the scripts of its own tree. Losses, scores,
spaces, generations, weights and evaluations are compared, files of earlier versions in the form of this one; what a
clock says is not. The files of the working directory
stand for this side, committed or not.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import onnx
import onnx.numpy_helper

from bsnas.benchmarks.parts.faults.disturbed_runs import ROOT, differences, outcome, rank_environments
from bsnas.benchmarks.parts.faults.soak_pipeline import EVOLVE, RETRAIN, TRAIN
from bsnas.engine.checkpoints.old_names import old_name
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.space.space import Space

SHOWN = 20
"""Differences that are printed."""


@dataclass(frozen=True, kw_only=True)
class SameResultsArguments:
    against: str
    """Commit to compare the files of this tree with."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes to run the pipeline with."""
    directory: Path | None = None
    """Where the runs go; by default a temporary directory, which is removed."""
    json: Path | None = None
    """File for the differences."""


def main() -> None:
    arguments = parse(SameResultsArguments, __doc__, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="same-results-") as temporary:
        directory = (arguments.directory or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        other = check_out(arguments.against, directory / "other")
        try:
            found = {count: compare(count, other, directory) for count in arguments.processes}
        finally:
            git("worktree", "remove", "--force", str(other))
    write_figures(arguments.json, {"against": arguments.against, "differences": found})
    if any(found.values()):
        raise UserError(f"results differ from those of {arguments.against} in the places listed above")


def compare(processes: int, other: Path, directory: Path) -> list[str]:
    """Run both pipelines; print and return where they differ."""
    runs = []
    for name, tree in (("before", other), ("after", ROOT)):
        runs.append(directory / f"{name}-{processes}")
        pipeline(tree, runs[-1], processes, directory / "cache")
    before, after = (of_one_form(outcome(path)) for path in runs)
    found = differences(before, after)
    print(f"{processes} processes: {len(before)} files compared, {len(found)} differences", flush=True)
    for line in found[:SHOWN]:
        print(f"  {line}")
    return found


def of_one_form(content: Any) -> Any:
    """What a run decided with spaces and names of weights in one form, whichever version wrote it."""
    if isinstance(content, (list, tuple)):
        return [of_one_form(value) for value in content]
    if not isinstance(content, Mapping):
        return content
    if "live" in content and ("table" in content or "clusters" in content):
        return Space.from_json(content).to_json()
    result = {
        old_name(str(key)): layers_of(value) if str(key).endswith(".onnx") else of_one_form(value)
        for key, value in content.items()
    }
    weights = next((content[part] for part in ("supernet", "network") if part in content), None)
    if weights is not None and "optimization" in content:  # it numbers the parameters in the order of the weights
        buffers = ("running_mean", "running_var", "num_batches_tracked")
        names = [old_name(name) for name in weights if not name.endswith(buffers)]
        momenta = content["optimization"]["optimizer"]["state"]
        result["optimization"] = {names[number]: of_one_form(momentum) for number, momentum in momenta.items()}
    return result


def layers_of(model: bytes) -> list[Any]:
    """What an ONNX file computes, without the names that its tensors have."""
    graph = onnx.load_from_string(model).graph
    weights = {
        tensor.name: (list(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes()) for tensor in graph.initializer
    }
    return [
        (node.op_type, sorted(map(str, node.attribute)), [weights[name] for name in node.input if name in weights])
        for node in graph.node
    ]


def pipeline(tree: Path, directory: Path, processes: int, cache: Path) -> None:
    """The scripts of a tree, one after another; those that train or score in several processes."""
    where = ["--run", str(directory)]
    call(tree, "engine/train.py", [*TRAIN, "--precision", "fp32", "--data.cache-dir", str(cache), *where], processes)
    call(tree, "search/evolve.py", [*EVOLVE, *where], processes)
    call(tree, "engine/retrain.py", [*RETRAIN, *where], processes)
    call(tree, "engine/export.py", where, 1)


def call(tree: Path, script: str, options: Sequence[str], processes: int) -> None:
    """Run a script of the tree in so many processes. Raises `UserError` with its last words when it fails."""
    command = [sys.executable, str(tree / script), *options]
    environments: Sequence[Mapping[str, str]] = rank_environments(processes) if processes > 1 else [{}]
    common = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    common["CUDA_VISIBLE_DEVICES"] = ""  # the pipeline is compared on the CPU
    with ExitStack() as opened:
        files = [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in environments]
        ranks = [
            subprocess.Popen(command, env={**common, **own}, cwd=tree, stdout=file, stderr=subprocess.STDOUT)
            for own, file in zip(environments, files, strict=True)
        ]
        failed = [file for rank, file in zip(ranks, files, strict=True) if rank.wait()]
        if failed:
            failed[0].seek(0)
            raise UserError(
                f"{script} of {tree} ended with an error; it said: {' '.join(failed[0].read().split())[-600:]}"
            )


def check_out(commit: str, where: Path) -> Path:
    """The files of a commit of this repository. Raises `UserError` when there is none of that name."""
    try:
        git("worktree", "add", "--detach", "--force", str(where), commit)
    except subprocess.CalledProcessError as error:
        raise UserError(f"--against {commit} cannot be checked out: {error.stderr.strip()}; give a commit") from None
    return where


def git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)


if __name__ == "__main__":
    run(main)
