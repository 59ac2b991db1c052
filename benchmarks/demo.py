"""The whole pipeline on one data set: train and shrink, evolve, retrain, export, measure, report; then one table.

    python benchmarks/demo.py --run runs/digits

Each step is the command that a user would type, and is printed. A repeated call continues or reuses what is stored.
"""

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import EXIT_CONTINUE, GRACE_SECONDS, Preempted, handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bsnas.engine.host.console import duration
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir, read_json

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    run: Path = Path("runs/digits")
    """Run directory; a run that is there already is continued."""
    preset: str = "digits"
    """Preset to train: digits or fashion-mnist."""
    processes: int = 1
    """Processes that train together."""
    max_macs: str = "4M"
    """Most multiply-adds of the network to find."""
    population: int = 30
    """Architectures in a generation of the evolution (the paper takes 75)."""
    iterations: int = 5
    """Generations after the first (the paper takes 20)."""
    json: Path | None = None
    """File for the figures of all steps."""


def main() -> None:
    arguments = parse(DemoArguments, __doc__, sys.argv[1:])
    started = time.perf_counter()
    figures = run_pipeline(arguments)
    figures["seconds"] = time.perf_counter() - started
    write_figures(arguments.json, figures)
    show(RunDir.open(arguments.run), figures)


def run_pipeline(arguments: DemoArguments) -> dict[str, Any]:
    """All steps in order. Returns the figures of each by its name, and the seconds it took under `seconds_NAME`."""
    run_dir = RunDir(arguments.run)
    train = ["engine/train.py", "--preset", arguments.preset]
    if run_dir.config_file.exists():
        train = ["engine/train.py", "--resume"]
    search = ["--max-macs", arguments.max_macs, "--population", str(arguments.population)]
    search += ["--iterations", str(arguments.iterations)]
    steps = {
        "train": [*_launcher(arguments.processes), *train],
        "evolve": [sys.executable, "search/evolve.py", *search],
        "retrain": [*_launcher(arguments.processes), "engine/retrain.py"],
        "export": [sys.executable, "engine/export.py"],
        "latency": [sys.executable, "benchmarks/latency.py", "--batch-sizes", "1", "32", "--precisions", "fp32"],
        "report": [sys.executable, "search/report.py"],
    }
    figures: dict[str, Any] = {}
    for name, command in steps.items():
        file = run_dir.figures / f"{name}.json"
        shown = [Path(command[0]).name, *command[1:]]
        print(f"\n$ {' '.join(shown)} --run {arguments.run}", flush=True)
        began = time.perf_counter()
        code = run_step([*command, "--run", str(run_dir.path), "--json", str(file)])
        if code == EXIT_CONTINUE:
            raise Preempted(f"the step {name} was stopped; the same command continues")
        if code:
            raise UserError(f"the step {name} ended with exit code {code}; its message is above")
        figures[name] = read_json(file)
        figures[f"seconds_{name}"] = time.perf_counter() - began
    return figures


def run_step(command: list[str]) -> int:
    """The exit code of a command; told to stop, its processes are told too, and have saved when this ends."""
    step = subprocess.Popen(command, cwd=ROOT, env=_environment())
    try:
        return step.wait()
    except Preempted:
        with suppress(psutil.NoSuchProcess):
            everyone = [psutil.Process(step.pid), *psutil.Process(step.pid).children(recursive=True)]
            for process in everyone:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            psutil.wait_procs(everyone, timeout=GRACE_SECONDS)
        raise


def _launcher(processes: int) -> list[str]:
    """DeepSpeed's launcher on a free port: its own, 29500, is taken while another run is launched here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).parent / "deepspeed")
    return [program, "--quiet", "--num_gpus", str(processes), "--master_port", str(port)]


def _environment() -> dict[str, str]:
    """The environment of the steps, with this interpreter's directory first: the launcher starts `python3`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")  # otherwise the launcher warns that it found no GPU
    return environment


def show(run_dir: RunDir, figures: dict[str, Any]) -> None:
    """One table: what was searched, what was found, what it is worth, and where everything is."""
    best, retrained, export = figures["evolve"]["best"], figures["retrain"], figures["export"]
    table = Table(show_header=False, title=f"BS-NAS on {run_dir.config().preset}", title_justify="left")
    for step, space in enumerate(run_dir.spaces()):
        when = f"space after shrink step {step}" if step else "full space"
        table.add_row(when, f"{space.num_architectures:.3g} architectures, at most {space.max_live} operations a block")
    for probe in RunFacts(run_dir.path).probes:
        low, middle, high = probe["top1"][0], probe["median"], probe["top1"][-1]
        table.add_row(
            f"one-shot top-1, {probe['when']}", f"{low:.3f} / {middle:.3f} / {high:.3f} (min / median / max of 20)"
        )
    table.add_row("best subnet", best["arch"].replace("_", "\n"))
    table.add_row("MACs, parameters", f"{best['macs'] / 1e6:.2f} M, {best['params'] / 1e3:.1f} k")
    table.add_row("one-shot top-1", f"{best['top1']:.4f} (search-validation set)")
    table.add_row(
        "retrained top-1, top-5",
        f"{retrained['test_top1']:.4f}, {retrained['test_top5']:.4f} ({retrained['test_images']} test images)",
    )
    table.add_row("ONNX parity", _parity(export))
    for row in figures["latency"]["rows"]:
        table.add_row(_latency_name(row), escape(_latency_value(row)))
    table.add_row("time", ", ".join(f"{k[8:]} {duration(v)}" for k, v in figures.items() if k.startswith("seconds_")))
    table.add_row("everything is in", str(run_dir.path))
    table.add_row("the report", figures["report"]["report"])
    Console(width=110).print(table)


def _parity(export: dict[str, Any]) -> str:
    if "not_checked" in export:
        return f"not checked: {export['not_checked']}"
    return (
        f"max error {export['max_abs_error']:.1e}, top-1 agreement {export['top1_agreement']:.1%} "
        f"on {export['images']} images"
    )


def _latency_name(row: dict[str, Any]) -> str:
    return " ".join(
        ["latency", row["backend"], *(f"{name} {row[name]}" for name in ("precision", "batch") if name in row)]
    )


def _latency_value(row: dict[str, Any]) -> str:
    if "why" in row:
        return f"not run: {row['why']}"
    return (
        f"{row['p50_ms']:.3f} ms (p90 {row['p90_ms']:.3f}, p99 {row['p99_ms']:.3f}), {row['images_per_s']:.0f} images/s"
    )


if __name__ == "__main__":
    run(main)
