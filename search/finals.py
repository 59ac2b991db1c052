"""Train the best networks of a search for a while, the better half longer, and choose the winner by that.

    deepspeed search/finals.py --run runs/digits
    deepspeed search/finals.py --run runs/imagenet --networks 8 --epochs 4 --decay-epochs 2

Networks are compared on the search-validation images, which they do not train on. Finals that were interrupted
continue. Then engine/retrain.py takes the winner and goes on with its training.
"""

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import tyro

from bsnas.engine.config import SafetyConfig
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.deepspeed_settings import load_deepspeed_settings
from bsnas.engine.host.distributed import entered_by_main, start_process
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.commands import recorded
from bsnas.search.runs.finals import Finals, FinalsConfig


@dataclass(frozen=True, kw_only=True)
class FinalsArguments:
    run: Path
    """Run directory with a finished search."""
    finals: Annotated[FinalsConfig, tyro.conf.arg(name="")] = field(default_factory=FinalsConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    deepspeed_config: Path | None = None
    """DeepSpeed JSON that is merged over the generated configuration."""
    kernels: str | None = None
    """Kernel backend to force: reference, triton or onednn."""
    json: Path | None = None
    """File for the figures of these finals."""


def main() -> None:
    arguments = parse(FinalsArguments, __doc__, sys.argv[1:])
    overrides = load_deepspeed_settings(arguments.deepspeed_config)
    process = start_process(arguments.safety.timeout_minutes, arguments.kernels)
    trained = TrainedRun.open(arguments.run, process)
    with entered_by_main(process, trained.run.lock()), recorded(trained.run, "finals", device=process.device):
        found = Finals(trained, arguments.finals, overrides, arguments.safety).hold()
        if process.is_main:
            write_figures(arguments.json, found)
            print(
                f"winner: {found['winner']['arch']}; engine/retrain.py --run {arguments.run} goes on with its training"
            )


if __name__ == "__main__":
    run(main)
