"""How much of supernet training is lost to data, and how much to everything but forward, backward and step?

python benchmarks/throughput.py
python benchmarks/throughput.py --preset digits --batch-size 64 --rounds 9 --json throughput.json
python benchmarks/throughput.py --path /data/imagenet --batches fresh

The trainer of a preset runs rounds of paths with its loader and with a batch that is in memory already, in turns.
Without --path, the imagenet preset gets generated photographs (benchmarks/parts/loading/photographs.py). images_per_s
counts forward-backward passes over images; ratios are taken within a turn, figures are medians over turns, which swap
their order each time. The share outside of forward, backward and step comes from a further round in each turn, in which
the device is waited for at each of them: such waits would hide what a GPU does while the host goes on.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import torch
from torch import Tensor

from bsnas.benchmarks.parts.loading.photographs import write_photographs
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.config import RunConfig, SafetyConfig
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.deepspeed_settings import load_deepspeed_settings
from bsnas.engine.host.distributed import Process, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.presets import preset
from bsnas.engine.runs.commands import hardware
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.training.metrics import Meter, Reporter
from bsnas.engine.training.supernet import SupernetTraining
from bsnas.kernels import graphs

PHOTOGRAPHS = 516
"""Four are held out; the other 512 make batches of 64 and of 256 that are all equally large."""
HELD = 8
"""Batches that the synthetic contender repeats."""
NEVER = SafetyConfig(checkpoint_minutes=1e6)
"""No checkpoint falls into a measurement."""


@dataclass(frozen=True, kw_only=True)
class ThroughputArguments:
    """Measure training with real and with synthetic images."""

    preset: str = "imagenet"
    """Space, optimizer and augmentation to train with."""
    path: Path | None = None
    """Your own images: a directory of train/ and val/, or a prepared one."""
    batch_size: int = 8
    """Images of one pass over all processes."""
    batches: Literal["preset", "shared", "fresh"] = "preset"
    """shared: a batch for all paths of a round; fresh: one for each path, the hardest case for the loader."""
    rounds: int = 3
    """Turns, in each of which a round of paths is trained with real and one with synthetic images."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON that is merged over the generated configuration."""
    threads: int = 0
    """Decoding threads per process; 0 takes what training would take."""
    cache_dir: str = "~/.cache/bsnas"
    """Where images and lists are kept."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.rounds) < 1 or self.threads < 0:
            raise UserError("batch_size and rounds must be at least 1, threads at least 0")


def main() -> None:
    arguments = parse(ThroughputArguments, __doc__, sys.argv[1:])
    overrides = load_deepspeed_settings(arguments.deepspeed_config)
    process = start_process()
    with tempfile.TemporaryDirectory() as place:
        trainer = make_trainer(configuration(arguments), Path(place), process, overrides)
        figures = measure(trainer, arguments.rounds)
    if process.is_main:
        print(
            f"real {figures['images_per_s']['real']:.1f} images/s, "
            f"synthetic {figures['images_per_s']['synthetic']:.1f}: {figures['share_of_synthetic']:.1%}; "
            f"waiting for data {figures['data_wait_share']:.2%}, "
            f"outside of forward, backward and step {figures['overhead_share']:.2%}"
        )
        settings = {"preset": arguments.preset, "batch_size": arguments.batch_size, "batches": arguments.batches}
        settings |= {"cuda_graphs": graphs.switched_on(), "deepspeed_config": overrides}
        settings |= {"device": hardware(process.device), "torch": torch.__version__}
        write_figures(arguments.json, {**provenance(), **settings, **figures})


def configuration(arguments: ThroughputArguments) -> RunConfig:
    """The preset's, over the images of the arguments."""
    config = preset(arguments.preset)
    data = replace(config.data, cache_dir=arguments.cache_dir, threads=arguments.threads)
    if arguments.path is not None:
        data = replace(data, source="folder", path=str(arguments.path))
    elif data.source == "folder":
        where = Path(arguments.cache_dir).expanduser() / "benchmark" / f"photographs-{PHOTOGRAPHS}"
        data = replace(data, path=str(write_photographs(where, PHOTOGRAPHS)), val_per_class=1)
    sampling = config.sampling
    if arguments.batches != "preset":
        sampling = replace(sampling, batches=arguments.batches)
    return replace(
        config, data=data, sampling=sampling, optimizer=replace(config.optimizer, batch_size=arguments.batch_size)
    )


def make_trainer(config: RunConfig, place: Path, process: Process, overrides: dict[str, Any]) -> SupernetTraining:
    run_dir = RunDir(place / f"run-{process.rank}")
    run_dir.path.mkdir()
    data = open_dataset(config.data, run_dir.split_file)
    config = replace(config, space=replace(config.space, classes=len(data.classes)))
    trainer = SupernetTraining(config, run_dir, process, data, overrides, NEVER)
    trainer.reporter = Reporter(1, enabled=False)  # its line would wait for the device
    return trainer


def measure(trainer: SupernetTraining, rounds: int) -> dict[str, Any]:
    """Images/s of both, and the shares of time that the real one loses."""
    real = trainer.batches()
    # Batch sizes differ by one, so a few batches are held. DALI reuses the memory of a batch that it has given.
    held = [(images.clone(), labels.clone()) for images, labels in islice(real, HELD)]
    contenders: dict[str, Iterator[tuple[Tensor, Tensor]]] = {"real": real, "synthetic": cycle(held)}
    trainer.network.train()
    for batches in list(contenders.values()) * 2:
        timed_round(trainer, batches)  # kernels are chosen, memory grows
    rows: dict[str, list[Turn]] = {name: [] for name in contenders}
    overhead_shares = []
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            rows[name].append(timed_round(trainer, contenders[name]))
        with compute_clock(trainer) as computed:
            clocked = timed_round(trainer, real)
        overhead_shares.append(1 - (computed[0] + clocked.waited) / clocked.seconds)
    pairs = list(zip(rows["real"], rows["synthetic"], strict=True))
    return {
        "images_per_s": {name: median(turn.images / turn.seconds for turn in turns) for name, turns in rows.items()},
        "share_of_synthetic": median(
            (real.images / real.seconds) / (synthetic.images / synthetic.seconds) for real, synthetic in pairs
        ),
        "data_wait_share": median(turn.waited / turn.seconds for turn in rows["real"]),
        "overhead_share": median(overhead_shares),
    }


@dataclass(frozen=True)
class Turn:
    """One round of paths."""

    images: int
    seconds: float
    waited: float
    """For data, in seconds."""


def timed_round(trainer: SupernetTraining, batches: Iterator[tuple[Tensor, Tensor]]) -> Turn:
    """Train a round of paths; on a GPU its end is waited for."""
    device = trainer.process.device
    trainer.meter = Meter(device)
    waited = trainer.loader.wait_seconds
    synchronize(device)
    began = time.perf_counter()
    trainer.make_steps(trainer.round(batches))
    synchronize(device)
    seconds = time.perf_counter() - began
    images = int(trainer.meter.state()[2]) * trainer.process.world_size
    return Turn(images, seconds, trainer.loader.wait_seconds - waited)


@contextmanager
def compute_clock(trainer: SupernetTraining) -> Iterator[list[float]]:
    """Sums the time of forward, backward and step while it is open; on a GPU each of them is waited for."""
    device, total = trainer.process.device, [0.0]

    def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            synchronize(device)
            began = time.perf_counter()
            result = call(*arguments)
            synchronize(device)
            total[0] += time.perf_counter() - began
            return result

        return timed

    optimization = trainer.optimization
    names = ("forward", "backward", "step")
    for name in names:
        setattr(optimization, name, clocked(getattr(optimization, name)))
    try:
        yield total
    finally:
        for name in names:
            delattr(optimization, name)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run(main)
