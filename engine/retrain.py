"""Train a released network from scratch and report its accuracy on the test set.

    deepspeed engine/retrain.py --run runs/digits
    deepspeed engine/retrain.py --run runs/digits --arch c24:k3t3,k5t6_c48:...  --inherit

Without --arch it takes the winner of the finals of the latest search, whose training there it goes on with, or the best
architecture of the search. A training that was interrupted continues.
"""

import re
import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import torch

from bsnas.engine.config import RetrainConfig, RunConfig, SafetyConfig
from bsnas.engine.data.loading.evaluation_set import evaluation_set
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.deepspeed_settings import load_deepspeed_settings
from bsnas.engine.host.distributed import Process, entered_by_main, on_main, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.networks.subnet import Subnet, release
from bsnas.engine.release.saved_network import load_network, save_network
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import NetworkDir, RunDir, read_json, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import CostModel
from bsnas.engine.training.network import NetworkTraining, measure_accuracy
from bsnas.engine.training.teacher import digest


@dataclass(frozen=True, kw_only=True)
class RetrainArguments:
    run: Path
    """Run directory of a search."""
    arch: str | None = None
    """Architecture to train; by default the winner of the finals, else the best of the latest search."""
    inherit: bool = False
    """Start from the supernet's weights instead of from scratch."""
    scratch: bool = False
    """Start from scratch also where the finals have begun with the network."""
    epochs: int | None = None
    """Epochs; by default as in the run's configuration."""
    learning_rate: float | None = None
    """Peak learning rate; by default as in the run's configuration."""
    batch_size: int | None = None
    """Images of one step over all processes; by default as in the run's configuration."""
    teacher: Path | None = None
    """Network to learn from beside the labels, as --teacher of engine/train.py; by default the run's."""
    overwrite: bool = False
    """Replace the retrained network of another architecture or setting that the run holds."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    deepspeed_config: Path | None = None
    """DeepSpeed JSON that is merged over the generated configuration."""
    kernels: str | None = None
    """Kernel backend to force: reference, triton or onednn."""
    json: Path | None = None
    """File for the figures of this training."""


def main() -> None:
    arguments = parse(RetrainArguments, __doc__, sys.argv[1:])
    overrides = load_deepspeed_settings(arguments.deepspeed_config)
    process = start_process(arguments.safety.timeout_minutes, arguments.kernels)
    run_dir = RunDir.open(arguments.run)
    with entered_by_main(process, run_dir.lock()), recorded(run_dir, "retrain", device=process.device):
        figures = retrain(run_dir, arguments, process, overrides)
        if process.is_main:
            write_figures(arguments.json, figures)
            write_json(run_dir.retrain.result_file, figures)
            print(
                f"test top-1 {figures['test_top1']:.4f}, top-5 {figures['test_top5']:.4f} on {figures['test_images']} "
                f"images; {figures['macs'] / 1e6:.2f} M MACs, {figures['params'] / 1e6:.3f} M parameters; "
                f"network in {run_dir.retrain.network_file}"
            )


def retrain(
    run_dir: RunDir, arguments: RetrainArguments, process: Process, overrides: dict[str, Any]
) -> dict[str, Any]:
    """Train, save and test the network. Returns the figures of --json."""
    config = _with_overrides(run_dir.config(), arguments)
    teacher = config.teacher_sha256
    winner = on_main(process, lambda: winner_of_finals(run_dir))
    arch = Arch.parse(arguments.arch or (winner.arch if winner else _best_arch(run_dir)))
    config.space.check(arch)
    start = winner if winner and str(arch) == winner.arch and not (arguments.inherit or arguments.scratch) else None
    if start and start.epochs >= config.retrain.epochs:
        raise UserError(
            f"the finals have trained {arch} for {start.epochs} epochs, and its whole training has "
            f"{config.retrain.epochs}; give more --epochs, or --scratch"
        )
    request = {
        "arch": str(arch), "inherit": arguments.inherit, "epochs": config.retrain.epochs,
        "learning_rate": config.retrain.learning_rate, "batch_size": config.retrain.batch_size,
        **({"finals": start.epochs} if start else {}), **({"teacher": teacher} if teacher else {}),
    }  # fmt: skip
    on_main(process, lambda: _check_free(run_dir, request, arguments.overwrite))
    torch.manual_seed(config.seed)
    trained = TrainedRun.open(run_dir.path, process)
    network = release(trained.supernet, arch) if arguments.inherit else Subnet(config.space, arch)
    trainer = NetworkTraining(
        network, config, run_dir.retrain.path, request, process, trained.data, overrides, arguments.safety,
        start=start.checkpoints if start else None,
    )  # fmt: skip
    trainer.train()
    if process.is_main:
        save_network(run_dir.retrain.network_file, network)
    test = evaluation_set(trained.data.open_test(), config.data)
    final = load_network(run_dir.retrain.network_file) if process.is_main else network
    accuracy = measure_accuracy(final.to(process.device), test, process.device)
    macs, params = CostModel(config.space).macs_and_params(arch)
    return {
        **request,
        "macs": macs,
        "params": params,
        "test_top1": accuracy.top1,
        "test_top5": accuracy.top5,
        "test_images": accuracy.images,
    }


def _with_overrides(config: RunConfig, arguments: RetrainArguments) -> RunConfig:
    kept = config.retrain
    settings = RetrainConfig(
        epochs=kept.epochs if arguments.epochs is None else arguments.epochs,
        learning_rate=kept.learning_rate if arguments.learning_rate is None else arguments.learning_rate,
        batch_size=kept.batch_size if arguments.batch_size is None else arguments.batch_size,
    )
    if arguments.teacher is not None:
        config = replace(config, teacher=str(arguments.teacher), teacher_sha256=digest(arguments.teacher))
    return replace(config, retrain=settings)


@dataclass(frozen=True)
class Winner:
    """The network that the finals of the latest search chose."""

    arch: str
    epochs: int
    """Epochs at a constant rate that it is trained for."""
    checkpoints: Path


def winner_of_finals(run_dir: RunDir) -> Winner | None:
    """None where the latest search had no finals, or they are not finished. Raises `UserError` for a damaged file."""
    file = run_dir.finals_file
    if not file.is_file() or not run_dir.best_file.is_file():
        return None
    best, found = read_json(run_dir.best_file), read_json(file)
    try:
        if found["search"] != {"arch": best["arch"], "limits": best["limits"]} or "winner" not in found:
            return None
        arch, epochs, training = (found["winner"][name] for name in ("arch", "epochs", "training"))
        if type(epochs) is not int or epochs < 1 or not re.fullmatch("[0-9a-f]{12}", training):
            raise ValueError
        return Winner(str(Arch.parse(arch)), epochs, NetworkDir(run_dir.finals / training).checkpoints)
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{file} holds no finals of this program; remove it, and repeat search/finals.py") from None


def _best_arch(run_dir: RunDir) -> str:
    file = run_dir.best_file
    if not file.is_file():
        raise UserError(
            f"{run_dir.path} holds no search result; run search/evolve.py --run {run_dir.path} first, or give --arch"
        )
    return named_arch(file)


def named_arch(file: Path) -> str:
    """The architecture that a search's best.json names. Raises `UserError` when it names none."""
    best = read_json(file)
    if not isinstance(best, dict) or not isinstance(best.get("arch"), str):
        raise UserError(f"{file} names no architecture; run search/evolve.py again, or give --arch")
    return best["arch"]


def _check_free(run_dir: RunDir, request: dict[str, Any], overwrite: bool) -> None:
    """Raise `UserError` when the run holds the retraining of something else."""
    file = run_dir.retrain.request_file
    held = read_json(file) if file.is_file() else request
    if held != request and not overwrite:
        raise UserError(
            f"{run_dir.retrain.path} holds the training of {held}; "
            "add --overwrite to replace it, or ask for the same to continue it"
        )


if __name__ == "__main__":
    run(main)
