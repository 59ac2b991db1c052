"""Ways to train the supernet of a table's space that are compared, each for about as many multiply-adds.

Eight of them are a fraction of a factorial over four factors: how paths are trained (four levels), who shares weights,
weight decay, and augmentation (two each). Every level of one factor meets every level of each other one equally often,
so that a factor's effect is the difference of two means over four supernets, not of two supernets.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from bsnas.engine.config import OptimizerConfig, RunConfig, SamplingConfig
from bsnas.engine.data.dataset import open_dataset
from bsnas.engine.host.distributed import Process, entered_by_main, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.presets import preset, with_space
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.space import Sharing, Space
from bsnas.engine.training.supernet import SupernetTraining

EPOCHS = 12
"""Passes over the training images, those of all paths counted."""
VAL_PER_CLASS = 200


@dataclass(frozen=True)
class Rule:
    """How paths are trained."""

    sampling: SamplingConfig
    batch_size: int
    learning_rate: float


_PATHS = SamplingConfig(update="path", batches="fresh")
RULES = {
    "fair": Rule(_PATHS, 256, 0.1),
    "calr": Rule(replace(_PATHS, complexity_decay=2.0), 256, 0.1),
    "sandwich": Rule(SamplingConfig(sampler="sandwich", distill="kl"), 128, 0.02),
    "alpha": Rule(SamplingConfig(sampler="sandwich", distill="alpha"), 128, 0.02),
}
"""A sandwich has four paths, of as many multiply-adds on average as a fair one, and one step; so it gets small batches,
and a rate for gradients that add up."""


@dataclass(frozen=True)
class Method:
    """One way to train a supernet."""

    rule: str
    sharing: Sharing
    weight_decay: float
    crop: bool
    """Random crops of padded images beside the mirroring; without, light augmentation."""

    def config(self, space: Space, images: Path, seed: int) -> RunConfig:
        """The configuration of a run on a directory of 32x32 images, as engine/train.py would make it."""
        rule, base = RULES[self.rule], with_space(preset("cifar10"), space)
        data = replace(base.data, source="folder", path=str(images), val_per_class=VAL_PER_CLASS)
        return replace(
            base,
            space=replace(base.space, classes=space.classes),
            data=data if self.crop else replace(data, augment="none"),
            sampling=rule.sampling,
            optimizer=OptimizerConfig(
                batch_size=rule.batch_size,
                learning_rate=rule.learning_rate,
                weight_decay=self.weight_decay,
                warmup_epochs=0.3,
            ),
            shrink=replace(base.shrink, first_epochs=EPOCHS, keep=(), bn="running"),
            sharing=self.sharing,
            seed=seed,
        )


_DECAY = 5e-4
METHODS = {
    "fair-channels-decay-crop": Method("fair", "channels", _DECAY, True),
    "sandwich-nested-decay-light": Method("sandwich", "nested", _DECAY, False),
    "calr-nested-free-crop": Method("calr", "nested", 0.0, True),
    "alpha-channels-free-light": Method("alpha", "channels", 0.0, False),
    "fair-nested-free-light": Method("fair", "nested", 0.0, False),
    "calr-channels-decay-light": Method("calr", "channels", _DECAY, False),
    "sandwich-channels-free-crop": Method("sandwich", "channels", 0.0, True),
    "alpha-nested-decay-crop": Method("alpha", "nested", _DECAY, True),
}
"""By name: rule, sharing, weight decay or free of it, crops or light augmentation."""


def train(method: str, space: Space, images: Path, seed: int, path: Path, process: Process) -> None:
    """Train the supernet of a method in a run directory, or what is left of it; nothing when it is trained.

    Raises `UserError` for a directory that holds another run, and for images of another number of classes.
    """
    config = METHODS[method].config(space, images, seed)

    def open_run() -> RunDir:
        if not RunDir(path).config_file.is_file():
            return RunDir.create(path, config)
        run = RunDir.open(path)
        if run.config() != config:
            raise UserError(
                f"{path} holds a run that is not of {method} with seed {seed} on {images}; give another --run"
            )
        return run

    run = on_main(process, open_run)
    if on_main(process, lambda: any(probe["when"] == "final" for probe in RunFacts(path).probes)):
        return
    with entered_by_main(process, run.lock()), recorded(run, "train", device=process.device):
        data = on_main(process, lambda: open_dataset(config.data, run.split_file))
        if len(data.classes) != space.classes:
            raise UserError(f"{images} has {len(data.classes)} classes and the table {space.classes}; give its images")
        SupernetTraining(config, run, process, data, {}).train()
