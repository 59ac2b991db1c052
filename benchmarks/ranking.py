"""Do one-shot accuracies rank networks as training them alone does? (paper, Figure 6)

deepspeed --num_gpus 1 benchmarks/ranking.py --run runs/digits --archs 20

A pool of architectures, stratified over one-shot accuracy and MACs, is trained from scratch, each network with the same
settings, and tested on the test set. Kendall's tau, Spearman's and Pearson's correlation and the gap between the two
accuracies are told with 95 % intervals, for the weights of every shrink step. A study that was interrupted continues.
"""

import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from rich.console import Console
from rich.table import Table

from bsnas.benchmarks.parts.study.agreement import agreement
from bsnas.benchmarks.parts.study.trained_alone import TrainedAlone
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.config import SafetyConfig
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import RunDir, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space


@dataclass(frozen=True, kw_only=True)
class RankingArguments:
    run: Path
    """Run directory of a trained supernet."""
    archs: int = 20
    """Networks to train."""
    candidates: int = 200
    """Random architectures that are scored to draw the networks from."""
    step: int | None = None
    """Draw from the space after this many shrink steps, 0 for the full one; by default after all."""
    epochs: int | None = None
    """Epochs of each network; by default as in the run's configuration."""
    bn: Literal["running", "recalibrate"] | None = None
    """Statistics of scored subnets; by default as in the run's shrink steps."""
    resamples: int = 2000
    """Bootstrap samples of an interval."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    json: Path | None = None
    """File for the figures; they are also in RUN/ranking/ranking.json."""

    def __post_init__(self) -> None:
        if not 3 <= self.archs <= self.candidates or self.resamples < 1:
            raise UserError(
                f"archs {self.archs}, candidates {self.candidates}, resamples {self.resamples}: need at least 3 archs, "
                "as many candidates or more, and at least 1 resample"
            )


def main() -> None:
    arguments = parse(RankingArguments, __doc__, sys.argv[1:])
    process = start_process(arguments.safety.timeout_minutes)
    run_dir = RunDir.open(arguments.run)
    with run_dir.lock() if process.is_main else nullcontext(), recorded(run_dir, "ranking", device=process.device):
        figures = study(run_dir, arguments, process)
        if process.is_main:
            write_json(run_dir.ranking_file, figures)
            write_figures(arguments.json, figures)
            _show(figures)


def study(run_dir: RunDir, arguments: RankingArguments, process: Process) -> dict[str, Any]:
    """Score, train and compare. Returns the figures of --json."""
    spaces = run_dir.spaces()
    step = len(spaces) - 1 if arguments.step is None else arguments.step
    if not 0 <= step < len(spaces):
        raise UserError(f"step {step}; {run_dir.path} has made {len(spaces) - 1} shrink steps: give 0 to that number")
    checkpoints = _checkpoints(spaces, step)
    pool = _pool(run_dir, arguments, process, spaces[step], checkpoints[-1])
    one_shot = {name: _scores(run_dir, arguments, process, at, pool) for name, at in checkpoints}
    alone = _train_all(run_dir, arguments, process, pool)
    rows = [
        {"checkpoint": name, **agreement(scores, alone, resamples=arguments.resamples)}
        for name, scores in one_shot.items()
    ]
    cost = CostModel(run_dir.config().space)
    newest = list(one_shot.values())[-1]
    archs = [
        {"arch": str(arch), "macs": cost.macs_and_params(arch)[0], "one_shot": a, "stand_alone": b}
        for arch, a, b in zip(pool, newest, alone, strict=True)
    ]
    return {
        **provenance(),
        "kendall_tau": rows[-1]["kendall_tau"],
        "confidence_interval": rows[-1]["kendall_tau_interval"],
        "checkpoints": rows,
        "space_after_step": step,
        "archs": archs,
    }


def _checkpoints(spaces: list[Space], step: int) -> list[tuple[str, int | None]]:
    """Name and number of the checkpoints that hold the space after `step` steps; None is the newest one."""
    made = len(spaces) - 1
    scored = [(f"before step {number}", number) for number in range(1, min(step + 1, made) + 1)]
    return [*scored, ("newest", None)] if step == made else list(scored)


# ---- which networks


def _pool(
    run_dir: RunDir, arguments: RankingArguments, process: Process, space: Space, newest: tuple[str, int | None]
) -> list[Arch]:
    """Networks from all quarters of the candidates' accuracies, spread over MACs in each."""
    rng = random.Random(f"{run_dir.config().seed}/ranking")
    drawn = dict.fromkeys(uniform_arch(space, rng) for _ in range(4 * arguments.candidates))
    candidates = list(drawn)[: arguments.candidates]
    if len(candidates) < arguments.archs:
        raise UserError(
            f"the space after the shrink steps holds {space.num_architectures} architectures, fewer than the "
            f"{arguments.archs} asked for; give fewer --archs, or a smaller --step"
        )
    return spread_over(space, candidates, _scores(run_dir, arguments, process, newest[1], candidates), arguments.archs)


def spread_over(space: Space, archs: Sequence[Arch], top1: Sequence[float], count: int) -> list[Arch]:
    """`count` architectures stratified over their accuracies, and over their MACs in each stratum."""
    accuracy, macs = dict(zip(archs, top1, strict=True)), CostModel(space).macs_and_params
    return stratified(archs, accuracy.__getitem__, lambda arch: macs(arch)[0], count)


def stratified(
    archs: Sequence[Arch], accuracy: Callable[[Arch], float], macs: Callable[[Arch], int], count: int, strata: int = 4
) -> list[Arch]:
    """`count` architectures: nearly equally many from every stratum of accuracy, evenly spaced by MACs inside it."""
    by_accuracy = sorted(archs, key=accuracy)
    chosen: list[Arch] = []
    for k in range(strata):
        stratum = sorted(by_accuracy[k * len(archs) // strata : (k + 1) * len(archs) // strata], key=macs)
        wanted = (k + 1) * count // strata - k * count // strata
        chosen += [stratum[round(i * (len(stratum) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return chosen


def _scores(
    run_dir: RunDir, arguments: RankingArguments, process: Process, at: int | None, archs: list[Arch]
) -> list[float]:
    """One-shot top-1 with the weights of a checkpoint."""
    evaluator = TrainedRun.open(run_dir.path, process, at).evaluator(arguments.bn)
    return [score.top1 for score in evaluator.evaluate(archs)]


# ---- their training


def _train_all(run_dir: RunDir, arguments: RankingArguments, process: Process, pool: list[Arch]) -> list[float]:
    """Test top-1 of each network, trained from scratch with the same settings and seed; known ones are taken over."""
    config = run_dir.config()
    if arguments.epochs is not None:
        config = replace(config, retrain=replace(config.retrain, epochs=arguments.epochs))
    data = TrainedRun.open(run_dir.path, process).data
    alone = TrainedAlone(run_dir.ranking, config, process, data, arguments.safety)
    return [alone.top1(config.space, arch) for arch in pool]


def _show(figures: dict[str, Any]) -> None:
    table = Table("weights", "Kendall tau", "Spearman", "Pearson", "gap")
    for row in figures["checkpoints"]:
        cells = [_with_interval(row, name) for name in ("kendall_tau", "spearman", "pearson", "gap")]
        table.add_row(row["checkpoint"], *cells)
    Console(width=110).print(table)


def _with_interval(row: dict[str, Any], name: str) -> str:
    value, interval = row[name], row[f"{name}_interval"]
    if value is None or interval is None:
        return "none"
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


if __name__ == "__main__":
    run(main)
