"""What do early decisions save in the shrink steps of a run, and would they have kept the same operations?

python benchmarks/early_decisions.py --run runs/fashion-mnist

For each shrink step that a run has made: its models are scored on all images, and placed into thirds by an evaluator
that stops as soon as a model's third is certain. Then both decide what the step keeps. Statistics are the running ones.
"""

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from rich.console import Console
from rich.table import Table

from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.evaluation.early_decisions import Place, Quotas, places_of
from bsnas.engine.evaluation.evaluator import Evaluator
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.rundir import RunDir, read_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.shrink import importance, shrink
from bsnas.engine.space.space import Space
from bsnas.engine.training.step_scores import StepScores, score_thirds


@dataclass(frozen=True, kw_only=True)
class EarlyDecisionsArguments:
    run: Path
    """Run directory whose shrink steps are repeated; nothing in it changes."""
    confidence: float = 0.999
    """Confidence at which a model's third counts as certain."""
    json: Path | None = None
    """File for the figures."""


def main() -> None:
    arguments = parse(EarlyDecisionsArguments, __doc__, sys.argv[1:])
    process = start_process()
    run_dir = RunDir.open(arguments.run)
    made = len(run_dir.spaces()) - 1
    if made == 0:
        raise UserError(f"{run_dir.path} has made no shrink step yet; train it further, or give another --run")
    console = Console(stderr=True)
    rows = [repeat_step(arguments.run, arguments.confidence, process, step) for step in range(1, made + 1)]
    table = Table("step", "models", "images saved", "full, early (s)", "thirds that differ", "blocks kept alike")
    for row in rows:
        table.add_row(
            str(row["step"]), str(row["models"]), f"{row['images_saved']:.1%}",
            f"{row['full_s']:.1f}, {row['early_s']:.1f}", str(row["thirds_differing"]),
            f"{row['blocks_kept_alike']} of {row['blocks']}",
        )  # fmt: skip
    console.print(table)
    write_figures(arguments.json, {**provenance(), "confidence": arguments.confidence, "steps": rows})


def repeat_step(run_path: Path, confidence: float, process: Process, step: int) -> dict[str, Any]:
    """The figures of one shrink step of a run."""
    trained = TrainedRun.open(run_path, process, step)
    space = trained.supernet.space
    archs = [Arch.parse(model["arch"]) for model in read_json(trained.run.shrink_file(step))["models"]]
    full, full_s = _timed(trained, archs, None)
    early, early_s = _timed(trained, archs, confidence)
    keep = trained.config.shrink.keep[step - 1]
    kept = [_kept(space, archs, scores, keep) for scores in (full, early)]
    thirds = [_thirds(scores) for scores in (full, early)]
    return {
        "step": step,
        "models": len(archs),
        "images": len(trained.search_val.labels),
        "top1": full.top1,
        "images_saved": early.images_saved,
        "full_s": full_s,
        "early_s": early_s,
        "thirds_differing": sum(a != b for a, b in zip(*thirds, strict=True)),
        "blocks": space.num_blocks,
        "blocks_kept_alike": sum(set(a) == set(b) for a, b in zip(kept[0].live, kept[1].live, strict=True)),
    }


def _timed(trained: TrainedRun, archs: list[Arch], confidence: float | None) -> tuple[StepScores, float]:
    """With an evaluator that knows no scores yet."""
    evaluator = Evaluator(trained.supernet, trained.search_val, process=trained.process)
    began = time.perf_counter()
    return score_thirds(evaluator, archs, confidence), time.perf_counter() - began


def _kept(space: Space, archs: list[Arch], scores: StepScores, keep: int) -> Space:
    return shrink(space, importance(space, archs, scores.ranks), keep)


def _thirds(scores: StepScores) -> list[Place]:
    third = len(scores.ranks) // 3
    order = sorted(range(len(scores.ranks)), key=lambda i: -scores.ranks[i])
    return places_of(order, Quotas(best=third, worst=third))


if __name__ == "__main__":
    run(main)
