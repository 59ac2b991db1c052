"""Train the supernet of a search, shrinking its space step by step.

deepspeed engine/train.py --preset digits --run runs/digits
deepspeed engine/train.py --preset imagenet --data.path /data/imagenet --run runs/imagenet
deepspeed engine/train.py --space my-space.toml --preset digits --run runs/mine
deepspeed engine/train.py --run runs/digits --resume
"""

import sys
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

import torch
import tyro

from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.deepspeed_settings import load_deepspeed_settings
from bsnas.engine.host.distributed import entered_by_main, on_main, start_process
from bsnas.engine.host.script import option, parse, run, write_figures
from bsnas.engine.presets import at_channels, at_resolution, preset, with_space
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.space_file import space_text
from bsnas.engine.space.spaces import space_at
from bsnas.engine.training.supernet import SupernetTraining
from bsnas.engine.training.teacher import digest, teacher_of


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    space: Path | None = None
    """TOML file of a search space in place of the preset's; one of the package by its name, as nas-bench-macro."""
    show_space: bool = False
    """Write the search space as such a file to the output, and train nothing."""
    run: Path | None = None
    """Run directory; by default runs/PRESET."""
    resume: bool = False
    """Continue the run from its newest checkpoint, with the configuration it started with."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    deepspeed_config: Path | None = None
    """DeepSpeed JSON that is merged over the generated configuration."""
    kernels: str | None = None
    """Kernel backend to force: reference, triton or onednn."""
    show: Path | None = None
    """Write a picture of augmented training images there (PNG), and train nothing."""
    json: Path | None = None
    """File for the figures of this training."""


def main() -> None:
    argv = sys.argv[1:]
    default = TrainArguments(config=_starting_config(argv))
    arguments = parse(TrainArguments, __doc__, argv, default)
    if arguments.show_space:
        print(space_text(arguments.config.space), end="")
        return
    if arguments.show is not None:
        show_augmented(arguments.config, arguments.show)
        return
    overrides = load_deepspeed_settings(arguments.deepspeed_config)
    path = arguments.run or Path("runs") / arguments.config.preset
    process = start_process(arguments.safety.timeout_minutes, arguments.kernels)
    run_dir, config = on_main(process, lambda: _open_run(path, arguments))
    with entered_by_main(process, run_dir.lock()), recorded(run_dir, "train", device=process.device):
        data = on_main(process, lambda: open_dataset(config.data, run_dir.split_file))
        trainer = SupernetTraining(config, run_dir, process, data, overrides, arguments.safety)
        trainer.train()
        if process.is_main:
            write_figures(arguments.json, trainer.figures())
            print(f"supernet trained; everything is in {run_dir.path}")


def _starting_config(argv: list[str]) -> RunConfig:
    """The preset that the options change, with the space of --space. Images follow a space that is given, and the
    space the resolution and the channels of images that are given."""
    config = preset(option(argv, "preset") or "digits")
    if given := option(argv, "space"):
        config = with_space(config, space_at(given))
    for name, adapt in (("resolution", at_resolution), ("channels", at_channels)):
        given = option(argv, f"data.{name}")
        if given and given.isdecimal() and int(given):  # anything else is left to the parser
            config = adapt(config, int(given))
    return config


def show_augmented(config: RunConfig, target: Path) -> None:
    """A grid: each row an image of the training set as it is and as training sees it in seven epochs."""
    from bsnas.engine.data.loading.show import write_augmented

    write_augmented(open_dataset(config.data).train, config.data, config.seed, target)
    print(f"augmented training images are in {target}")


def _open_run(path: Path, arguments: TrainArguments) -> tuple[RunDir, RunConfig]:
    if arguments.resume:
        run_dir = RunDir.open(path)
        return run_dir, run_dir.config()
    RunDir.refuse_existing(path)
    classes = len(open_dataset(arguments.config.data).classes)
    config = replace(arguments.config, space=replace(arguments.config.space, classes=classes))
    if config.teacher is not None:
        file = Path(config.teacher).absolute()
        config = replace(config, teacher=str(file))
        teacher_of(config, torch.device("cpu"))  # raises for one of other images or classes, before there is a run
        config = replace(config, teacher_sha256=digest(file))
    return RunDir.create(path, config), config


if __name__ == "__main__":
    run(main)
