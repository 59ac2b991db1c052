"""Presets: a function each, whose docstring holds the command and what to expect of it."""

from collections.abc import Callable
from dataclasses import replace

from bsnas.engine.config import (
    EvaluationConfig,
    OptimizerConfig,
    RetrainConfig,
    RunConfig,
    SamplingConfig,
    ShrinkConfig,
)
from bsnas.engine.data.dataset import DataConfig
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_named


def digits() -> RunConfig:
    """scikit-learn's 1797 digits at 16x16, the embedded default.

    `deepspeed --num_gpus 1 engine/train.py --preset digits`: about 1 minute on 2 CPU cores; random subnets reach a
    median one-shot top-1 above 0.95 after the last step.
    """
    return RunConfig(
        preset="digits",
        space=space_named("digits"),
        data=DataConfig(source="digits", resolution=16, val_per_class=20, augment="pad-crop", pad=1),
        # Short trainings need shared weights that see many updates, and recalibrated scores: docs/study.md has figures.
        # A third step, to 3 operations, leaves some ten architectures of so small a space: nothing to search.
        sharing="nested",
        sampling=SamplingConfig(update="path", batches="fresh"),
        optimizer=OptimizerConfig(batch_size=64, learning_rate=0.1, warmup_epochs=3),
        shrink=ShrinkConfig(
            first_epochs=24, interval_epochs=15, keep=(9, 5), models_per_operation=12, bn="recalibrate"
        ),
        retrain=RetrainConfig(epochs=36, learning_rate=0.1, batch_size=64),
        evaluation=EvaluationConfig(recalibration_images=256),
    )


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST's 70,000 images at 32x32.

    `python benchmarks/demo.py --preset fashion-mnist --max-macs 12M --run runs/fashion`: 37 minutes on 2 CPU cores that
    other jobs shared, 24 of them training; the network found had 92.5 % test top-1 with 11.7 M MACs.
    """
    return RunConfig(
        preset="fashion-mnist",
        space=space_named("fashion-mnist"),
        data=DataConfig(source="fashion-mnist", resolution=32, val_per_class=200, augment="pad-crop", pad=2, flip=True),
        sharing="nested",
        sampling=SamplingConfig(update="path", batches="fresh"),
        optimizer=OptimizerConfig(batch_size=128, learning_rate=0.1, warmup_epochs=1),
        shrink=ShrinkConfig(first_epochs=6, interval_epochs=3, keep=(9, 5), models_per_operation=20, bn="recalibrate"),
        retrain=RetrainConfig(epochs=10, learning_rate=0.1, batch_size=128),
        evaluation=EvaluationConfig(recalibration_images=256),
    )


def cifar10() -> RunConfig:
    """CIFAR-10's 60,000 images at 32x32, downloaded by torchvision.

    `deepspeed engine/train.py --preset cifar10 --run runs/cifar10`; images of your own in a directory with
    `--data.source folder --data.path DIRECTORY`. For limits of 10 to 40 M MACs.
    """
    return RunConfig(
        preset="cifar10",
        space=space_named("cifar10"),
        data=DataConfig(
            source="cifar10",
            resolution=32,
            val_per_class=500,
            augment="pad-crop",
            pad=4,
            flip=True,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
        ),
        sharing="nested",
        sampling=SamplingConfig(update="path", batches="fresh"),
        optimizer=OptimizerConfig(batch_size=128, learning_rate=0.1, warmup_epochs=2),
        shrink=ShrinkConfig(
            first_epochs=30, interval_epochs=15, keep=(14, 7), models_per_operation=20, bn="recalibrate"
        ),
        retrain=RetrainConfig(epochs=60, learning_rate=0.1, batch_size=128),
        evaluation=EvaluationConfig(recalibration_images=256),
    )


def imagenet() -> RunConfig:
    """ImageNet with the paper's numbers (Table 1, sections 3.2 and 4.1).

    `deepspeed engine/train.py --preset imagenet --data.path /data/imagenet`, where the directory holds train/CLASS/ and
    val/CLASS/. Any directory of that layout will do; the number of classes is read from it.
    """
    return RunConfig(
        preset="imagenet",
        space=space_named("imagenet"),
        data=DataConfig(
            source="folder",
            path="imagenet",
            resolution=224,
            resize=256,
            val_per_class=50,
            augment="resized-crop",
            flip=True,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        sharing="channels",
        sampling=SamplingConfig(update="round", batches="shared"),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "imagenet": imagenet,
}


def preset(name: str) -> RunConfig:
    """The preset of that name. Raises `UserError` for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; allowed are {', '.join(PRESETS)}")
    return PRESETS[name]()


def with_space(config: RunConfig, space: Space) -> RunConfig:
    """A preset for another space: resolution and channels of the images follow it."""
    data = at_channels(at_resolution(config, space.resolution), space.input_channels).data
    return replace(config, space=space, data=data)


def at_resolution(config: RunConfig, pixels: int) -> RunConfig:
    """A preset for images of another height and width: the space follows, and the resize before a centre crop."""
    data = config.data
    resize = data.resize and round(data.resize * pixels / data.resolution)
    return replace(
        config,
        space=replace(config.space, resolution=pixels),
        data=replace(data, resolution=pixels, resize=resize),
    )


def at_channels(config: RunConfig, channels: int) -> RunConfig:
    """A preset for images of another number of channels, normalised by the mean of its means and deviations."""
    if channels == config.data.channels:
        return config
    mean, std = ((round(sum(values) / len(values), 4),) for values in (config.data.mean, config.data.std))
    return replace(
        config,
        space=replace(config.space, input_channels=channels),
        data=replace(config.data, channels=channels, mean=mean, std=std),
    )
