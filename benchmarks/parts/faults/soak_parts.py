"""What benchmarks/soak.py does to runs. Each part gives counts, and a line for all that was not as it must be."""

import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bsnas.benchmarks.parts.faults.disturbed_runs import Faults, Started, differences, error_lines, outcome, start_ranks
from bsnas.benchmarks.parts.faults.mutated_files import (
    arch_reader,
    config_reader,
    manifest_fields_reader,
    manifest_reader,
    space_reader,
    try_mutations,
)
from bsnas.benchmarks.parts.faults.soak_pipeline import LONGEST, Pipelines, Report, poison_rank_1, steps
from bsnas.engine.checkpoints.checkpoint import write_checkpoint
from bsnas.engine.checkpoints.keep import newest_checkpoint
from bsnas.engine.checkpoints.manifest import Manifest, Progress, manifest_file
from bsnas.engine.checkpoints.tensor_file import read_tensors
from bsnas.engine.host.preemption import EXIT_CONTINUE
from bsnas.engine.presets import preset
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir, read_json
from bsnas.engine.space.sampling import uniform_arch

KINDS = ("cut off", "bit flipped", "empty")
WAIT_MINUTES = 0.2
"""How long ranks wait for each other here."""


def disturb(pipelines: Pipelines, number: signal.Signals, count: int, cold_share: float) -> Report:
    """Signals at random moments over whole pipelines, each continued, until `count` have hit."""
    report, expected = Report(), outcome(pipelines.reference)
    while report.counts["hits"] < count:
        run = pipelines.directory / f"{number.name.lower()}-{report.counts['pipelines'] + 1}"
        for script, arguments in pipelines.commands(run):
            while not _disturbed(report, pipelines, run, script, arguments(), number, count, cold_share):
                pass
        different = differences(expected, outcome(run))
        report.expect(not different, f"{run.name} ended differently: {'; '.join(different[:3])}")
        report.counts["pipelines"] += 1
        report.counts["identical at the end"] += not different
        if number == signal.SIGTERM and not cold_share:
            made, needed = steps(run), steps(pipelines.reference)
            report.expect(made == needed, f"{run.name} made {made} optimizer steps instead of {needed}")
            report.counts["optimizer steps made"] += made
            report.counts["optimizer steps needed"] += needed
        print(f"{number.name}: {report.counts['hits']} of {count}, {report.counts['pipelines']} pipelines", flush=True)
        shutil.rmtree(run)
    return report


def _disturbed(
    report: Report,
    pipelines: Pipelines,
    run: Path,
    script: str,
    arguments: list[str],
    number: signal.Signals,
    count: int,
    cold_share: float,
) -> bool:
    """Start a script and disturb it unless `count` is reached. Whether it has come to its end."""
    cold = pipelines.random.random() < cold_share
    if cold:
        process = Started(script, arguments, pipelines.log(run), cold=True)
    else:
        process = pipelines.start(run, script, arguments)
    wait = pipelines.random.uniform(0, 2 * pipelines.gap)
    asked = report.counts["hits"] < count and process.ended(wait) is None
    if asked:
        process.signal(number)
    began = time.monotonic()
    code, said = process.ended(LONGEST), process.said()
    report.expect("Traceback" not in said and not error_lines(said), f"{script}: {said[-600:]}")
    if code == 0:
        return True
    expected = -number if number == signal.SIGKILL else EXIT_CONTINUE
    report.expect(asked and code == expected, f"{script} ended with {code}: {said[-600:]}")
    report.counts["hits"] += 1
    report.counts[f"hits in {script}"] += 1
    report.counts["hits in processes that load their libraries"] += cold
    if number == signal.SIGTERM:
        report.slowest("stop", time.monotonic() - began)
        told = [line for line in said.splitlines() if line.startswith("stopped by SIGTERM")]
        report.expect(len(told) == 1, f"{script} said {len(told)} times why it stopped: {said[-600:]}")
        report.counts["stops between two steps of an epoch"] += "; saved in" in said
    return not (asked and code == expected)


def damage(pipelines: Pipelines) -> Report:
    """Every file cut off, with a bit flipped, and empty: those of checkpoints, then all others."""
    report, stopped = Report(), pipelines.stopped_late()
    names = sorted(file.name for file in (stopped / "checkpoints").iterdir() if file.is_file())
    for name in names:
        for kind in KINDS:
            run = pipelines.copy(stopped, "damaged")
            _damage(run / "checkpoints" / name, kind, pipelines.random)
            _continue_training(report, pipelines, run, f"{name} {kind}", without=name.split(".")[0])
            report.counts["checkpoint files damaged"] += 1
    for kind in KINDS:  # nothing whole is left
        run = pipelines.copy(stopped, "damaged")
        for name in names:
            _damage(run / "checkpoints" / name, kind, pipelines.random)
        process = pipelines.start(run, "engine/train.py", ["--run", str(run), "--resume"])
        code, lines = process.ended(LONGEST), error_lines(process.said())
        told = code == 2 and len(lines) == 1 and "no checkpoint in" in lines[0]
        report.expect(told, f"all checkpoints {kind}: {code}, {process.said()[-500:]}")
        report.counts["all checkpoints damaged, told in one line"] += told
    _damage_others(report, pipelines)
    return report


def _damage_others(report: Report, pipelines: Pipelines) -> None:
    """What else a script reads: it is refused in one line, or nothing of it was needed."""
    readers = {
        "engine/train.py": ("config.json", "split.json", "evaluations.sqlite", "metrics.jsonl"),
        "search/evolve.py": ("config.json", "spaces/step-2.json", "evaluations.sqlite", "search/*-seed0-*.json"),
        "engine/retrain.py": ("config.json", "split.json", "search/best.json", "retrain/request.json"),
        "engine/export.py": ("config.json", "split.json", "retrain/network.pt"),
    }
    for script, patterns in readers.items():
        for pattern in patterns:
            for kind in KINDS:
                run = pipelines.copy(pipelines.reference, "damaged")
                (file,) = run.glob(pattern)
                _damage(file, kind, pipelines.random)
                process = pipelines.start(run, script, dict(pipelines.commands(run))[script]())
                code, said = process.ended(LONGEST), process.said()
                lines = len(error_lines(said))
                clear = (code == 0 or (code in (2, 3) and lines == 1)) and "Traceback" not in said
                report.expect(clear, f"{script} with {pattern} {kind}: {code}, {said[-700:]}")
                report.counts["other files damaged"] += 1
                report.counts["of these told in one line"] += code != 0


def disk(pipelines: Pipelines) -> Report:
    """Files that cannot grow any more, at several sizes, in training; then there is room again."""
    report = Report()
    size = max(file.stat().st_size for file in (pipelines.reference / "checkpoints").glob("*.pt"))
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        run = pipelines.directory / "full"
        shutil.rmtree(run, ignore_errors=True)
        faults = Faults(file_bytes=int(size * share))
        process = pipelines.start(run, "engine/train.py", pipelines.train_arguments(run), faults)
        code, said = process.ended(LONGEST), process.said()
        told = code == 3 and len(error_lines(said)) == 1 and "Traceback" not in said
        report.expect(told, f"files of at most {share:.0%} of a checkpoint: {code}, {said[-700:]}")
        report.counts["full disks told in one line"] += told
        _continue_training(report, pipelines, run, f"after a disk full at {share:.0%}")
    return report


def ranks(pipelines: Pipelines, kills: int = 3) -> Report:
    """One of two ranks killed, or frozen: the other ends by itself, and both go on."""
    report, expected = Report(), outcome(pipelines.two_ranks("undisturbed-two"))
    for trial, number in enumerate([signal.SIGKILL] * kills + [signal.SIGSTOP]):
        run, lost = pipelines.directory / f"two-{trial}", trial % 2
        arguments = [*pipelines.train_arguments(run), "--safety.timeout-minutes", str(WAIT_MINUTES)]
        processes = start_ranks(2, "engine/train.py", arguments, pipelines.log(run))
        processes[lost].ended(pipelines.random.uniform(2, 2 + pipelines.gap))
        processes[lost].signal(number)
        began = time.monotonic()
        code, said = processes[1 - lost].ended(LONGEST), processes[1 - lost].said()
        report.slowest(f"wait after {number.name}", time.monotonic() - began)
        processes[lost].signal(signal.SIGKILL)
        processes[lost].ended(LONGEST)
        told = code == 3 and len(error_lines(said)) == 1 and "another process of this run was lost" in said
        report.expect(told and "Traceback" not in said, f"rank {1 - lost}, {number.name}: {code}, {said[-700:]}")
        report.counts[f"ranks lost by {number.name}, told in one line"] += told
        different = differences(expected, outcome(pipelines.two_ranks(run.name)))
        report.expect(not different, f"{run.name} ended differently: {'; '.join(different[:3])}")
        report.counts["identical at the end"] += not different
    waited = max(report.seconds.values())
    report.expect(waited < 60 * WAIT_MINUTES + 20, f"a rank was left waiting for {waited:.0f} s")
    return report


def nan(pipelines: Pipelines) -> Report:
    """No numbers in three batches of one rank of two: skipped by both, and a stop where three are too many."""
    report, run, poison = Report(), pipelines.directory / "nan", [Faults(patch=poison_rank_1)] * 2
    codes, said = pipelines.ended(
        start_ranks(2, "engine/train.py", pipelines.train_arguments(run), pipelines.log(run), faults=poison)
    )
    report.expect(codes == [0, 0], f"two ranks with no numbers on one: {codes}, {said[-900:]}")
    found = newest_checkpoint(RunDir(run).checkpoints)
    skipped = found.manifest.progress.skipped if found else 0
    report.expect(skipped == 3, f"{skipped} steps were skipped instead of 3")
    weights = read_tensors(found.file)["supernet"].values() if found else []
    report.expect(all(w.isfinite().all() for w in weights if w.is_floating_point()), "weights are no numbers")
    run = pipelines.directory / "nan-stopped"
    arguments = [*pipelines.train_arguments(run), "--safety.max-skipped", "3"]
    codes, said = pipelines.ended(start_ranks(2, "engine/train.py", arguments, pipelines.log(run), faults=poison))
    lines = error_lines(said)
    place = r"3 steps in a row, last in epoch 1, pass 8, path c\d+.*, images .*\.jpg"
    stopped = codes == [2, 2] and len(lines) == 1 and re.search(place, lines[0]) is not None
    report.expect(stopped, f"three in a row: {codes}, {said[-900:]}")
    report.counts |= {"steps skipped": skipped, "stops in one line": int(stopped)}
    return report


def mutations(pipelines: Pipelines, examples: int) -> Report:
    """Mutated architectures, configurations, spaces and manifests: refused in one line, or read as they are."""
    config, report = preset("digits"), Report()
    with tempfile.TemporaryDirectory(dir=pipelines.directory) as name:
        about = Manifest(progress=Progress(epoch=3, passes=60), data="0" * 64)
        manifest = manifest_file(write_checkpoint(Path(name), about, {"weights": torch.zeros(3)}))
        readers = {
            "architecture": arch_reader(config.space, uniform_arch(config.space, pipelines.random)),
            "configuration": config_reader(config),
            "space": space_reader(config.space),
            "manifest": manifest_reader(manifest),
            "manifest with its checksum set right": manifest_fields_reader(manifest),
        }
        counts, wrong = try_mutations(readers, Path(name), examples, pipelines.random.randrange(10**6))
    report.counts.update(counts)
    for line in wrong:
        report.expect(False, line)
    return report


def stall(pipelines: Pipelines) -> Report:
    """How long the digits preset stands still for checkpoints: one after each epoch of a second, and others besides.

    At the default interval of 10 minutes it must be less than 2 %; at 1.2 seconds it is only told.
    """
    report = Report()
    for minutes in ("10", "0.02"):
        run, figures = pipelines.directory / f"stall-{minutes}", pipelines.directory / "stall.json"
        arguments = ["--preset", "digits", "--run", str(run), "--data.cache-dir", str(pipelines.cache)]
        arguments += ["--safety.checkpoint-minutes", minutes, "--json", str(figures)]
        process = pipelines.start(run, "engine/train.py", arguments, Faults())
        report.expect(process.ended(LONGEST) == 0, f"training: {process.said()[-700:]}")
        seconds = sum(line["seconds"] for line in RunFacts(run).epochs)
        share = read_json(figures)["checkpoint_stall_seconds"] / seconds
        report.seconds |= {f"training, a checkpoint every {minutes} minutes": seconds}
        report.counts[f"hundredths of a percent of it standing still, every {minutes} minutes"] = round(1e4 * share)
        report.expect(minutes != "10" or share < 0.02, f"training stood still for {share:.2%} of its time")
    return report


def _continue_training(report: Report, pipelines: Pipelines, run: Path, what: str, without: str | None = None) -> None:
    """Continue a training to its end and compare it; the checkpoint `without` was damaged and stays so."""
    process = pipelines.start(run, "engine/train.py", pipelines.train_arguments(run))
    code, said = process.ended(LONGEST), process.said()
    report.expect(code == 0 and "Traceback" not in said, f"{what}: {code}, {said[-700:]}")
    expected, ended = (_training(outcome(path, without=without)) for path in (pipelines.reference, run))
    different = differences(expected, ended)
    report.expect(not different, f"{what} ended differently: {'; '.join(different[:3])}")
    report.counts["trainings continued"] += 1
    report.counts["identical at the end"] += not different


def _training(decided: dict[str, Any]) -> dict[str, Any]:
    """What training alone decides."""
    own: Sequence[str] = ("checkpoints", "spaces", "shrink", "metrics")
    return {name: value for name, value in decided.items() if name.startswith(tuple(own))}


def _damage(file: Path, kind: str, generator: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if kind == "cut off":
        del content[generator.randrange(len(content)) :]
    elif kind == "bit flipped":
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    else:
        content.clear()
    file.write_bytes(content)


Part = Callable[[], Report]
