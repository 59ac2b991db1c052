"""Ways to train the supernet of a table's space that are compared, each for about as many multiply-adds.

Four factors: how paths are trained (four levels), who shares weights, weight decay, and augmentation (two each). Eight
ways are a fraction of that factorial: every level of one factor meets every level of each other one equally often, so
that a factor's effect is the difference of two means over four supernets, not of two supernets.
"""

from dataclasses import dataclass, replace
from itertools import product
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

PASSES = 12
"""Over the training images, those of all paths counted."""
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

    def config(self, space: Space, images: Path, seed: int, passes: int = PASSES) -> RunConfig:
        """The configuration of a run on a directory of 32x32 images, as engine/train.py would make it.

        With sliced springs, so that a path is the network that it stands for.
        """
        rule, base = RULES[self.rule], with_space(preset("cifar10"), replace(space, springs="sliced"))
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
            shrink=replace(base.shrink, first_epochs=passes, keep=(), bn="running"),
            sharing=self.sharing,
            seed=seed,
        )


SHARINGS: tuple[Sharing, ...] = ("channels", "nested")
DECAYS = {"decay": 5e-4, "free": 0.0}
AUGMENTATIONS = {"crop": True, "light": False}
METHODS = {
    "-".join(names): Method(names[0], names[1], DECAYS[names[2]], AUGMENTATIONS[names[3]])
    for names in product(RULES, SHARINGS, DECAYS, AUGMENTATIONS)
}
"""By name: rule, sharing, weight decay or free of it, crops or light augmentation."""
FRACTION = (
    "fair-channels-decay-crop",
    "sandwich-nested-decay-light",
    "calr-nested-free-crop",
    "alpha-channels-free-light",
    "fair-nested-free-light",
    "calr-channels-decay-light",
    "sandwich-channels-free-crop",
    "alpha-nested-decay-crop",
)
"""The eight of the fraction."""


def train(
    method: str, space: Space, images: Path, seed: int, path: Path, process: Process, passes: int = PASSES
) -> None:
    """Train the supernet of a method in a run directory, or what is left of it; nothing when it is trained.

    Raises `UserError` for a directory that holds another run, and for images of another number of classes.
    """
    config = METHODS[method].config(space, images, seed, passes)

    def open_run() -> RunDir:
        if not RunDir(path).config_file.is_file():
            return RunDir.create(path, config)
        run = RunDir.open(path)
        if run.config() != config:
            raise UserError(
                f"{path} holds a run that is not of {method} with seed {seed} and {passes} passes on {images}; give "
                "another --run"
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
