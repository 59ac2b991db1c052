"""The table of a study: which supernets are trained, and what each changes against the base."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from bsnas.engine.config import RunConfig, SamplingConfig, ShrinkConfig
from bsnas.engine.presets import preset
from bsnas.engine.space.mobile import mobile_cluster, mobile_space
from bsnas.engine.space.space import Space

StudyPreset = Literal["digits", "fashion-mnist", "fashion-mnist-wide"]


@dataclass(frozen=True)
class Cell:
    """One supernet of the study. All cells make the same number of passes over images."""

    name: str
    about: str
    """What differs from the base, for tables."""
    change: Callable[[RunConfig], RunConfig]

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        return replace(self.change(base), seed=seed)


def base_config(name: StudyPreset, epochs: int | None, retrain_epochs: int | None) -> RunConfig:
    """The base: fair paths, an optimizer step per path on a batch of its own, nested weights, no shrinking.

    `epochs` of the supernet and of every network that is trained alone are the preset's study settings unless given.
    """
    start, space, default_epochs, default_retrain = _SCALES[name]
    config = preset(start)
    epochs = default_epochs if epochs is None else epochs
    retrain_epochs = default_retrain if retrain_epochs is None else retrain_epochs
    return replace(
        config,
        preset=f"{name}-study",
        space=space(config.space),
        sampling=SamplingConfig(sampler="fair", update="path", batches="fresh"),
        sharing="nested",
        shrink=replace(config.shrink, first_epochs=epochs, keep=()),
        retrain=replace(config.retrain, epochs=retrain_epochs),
        optimizer=replace(config.optimizer, warmup_epochs=min(config.optimizer.warmup_epochs, epochs / 8)),
    )


def light_space(_: Space) -> Space:
    """Eight blocks in five clusters for 32x32 images, all dimensions searched; two fifths of the preset's MACs."""
    channels = ((16, 20, 24), (24, 32, 40), (40, 48, 56), (56, 64, 80), (80, 96, 112))
    return _five_clusters(channels, stem_channels=16, tail_channels=256)


def wide_space(_: Space) -> Space:
    """`light_space` whose widest channels are three to four times the narrowest, not one and a half times.

    A seventh of the preset's MACs: size matters more to accuracy, and trainings are short.
    """
    channels = ((4, 8, 16), (8, 12, 24), (12, 24, 40), (16, 32, 56), (24, 48, 80))
    return _five_clusters(channels, stem_channels=8, tail_channels=128)


def _five_clusters(channels: Sequence[tuple[int, ...]], *, stem_channels: int, tail_channels: int) -> Space:
    """A space for Fashion-MNIST of the study's depth and strides, with these options of channels in each cluster."""
    depth_and_stride = ((1, 2), (2, 1), (2, 2), (2, 1), (1, 1))
    pairs = zip(depth_and_stride, channels, strict=True)
    clusters = [
        mobile_cluster(blocks=blocks, kernels=(3, 5, 7), expansions=(3, 6), channels=options, stride=stride)
        for (blocks, stride), options in pairs
    ]
    return mobile_space(
        clusters=clusters, resolution=32, classes=10, stem_channels=stem_channels, separable_channels=8,
        tail_channels=tail_channels,
    )  # fmt: skip


_SCALES: dict[StudyPreset, tuple[str, Callable[[Space], Space], int, int]] = {
    "digits": ("digits", lambda space: space, 40, 20),
    "fashion-mnist": ("fashion-mnist", light_space, 4, 2),
    "fashion-mnist-wide": ("fashion-mnist", wide_space, 12, 4),
}
"""Preset that a study starts from, its space, epochs of a supernet, epochs of a network trained alone."""


def fixed_channels(space: Space) -> Space:
    """The space with the middle channel number of every cluster only."""
    return space.with_clusters(
        [replace(c, channels=(sorted(c.channels)[len(c.channels) // 2],)) for c in space.clusters]
    )


def _shrinking(keep: tuple[int, ...], first_share: float) -> Callable[[RunConfig], RunConfig]:
    """Shrink steps at equal intervals after a share of the epochs; the sum of epochs stays."""

    def change(config: RunConfig) -> RunConfig:
        total = config.shrink.total_epochs
        interval = max(1, round(total * (1 - first_share) / len(keep)))
        shrink: ShrinkConfig = replace(
            config.shrink, keep=keep, interval_epochs=interval, first_epochs=total - interval * len(keep)
        )
        return replace(config, shrink=shrink)

    return change


def _sampling(**settings: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, sampling=replace(config.sampling, **settings))


CELLS = (
    Cell("base", "fair paths, a step per path, fresh batches, nested weights, no shrinking", lambda config: config),
    Cell("shrinking", "two shrink steps, to 9 and 5 operations per block", _shrinking((9, 5), 0.5)),
    Cell("shrinking-to-one", "three shrink steps, to 9, 5 and 1 operations per block", _shrinking((9, 5, 1), 0.25)),
    Cell(
        "uniform",
        "uniform sampling in place of fair",
        _sampling(sampler="uniform"),
    ),
    Cell(
        "path-shared",
        "a round's paths share a batch",
        _sampling(batches="shared"),
    ),
    Cell("round-fresh", "a step per round", _sampling(update="round")),
    Cell(
        "round-shared",
        "a step per round, on one batch",
        _sampling(update="round", batches="shared"),
    ),
    Cell("channels", "weights shared by operations of equal channels only", lambda c: replace(c, sharing="channels")),
    Cell("independent", "weights of each operation its own", lambda c: replace(c, sharing="independent")),
    Cell("fixed-channels", "channels fixed at the middle option", lambda c: replace(c, space=fixed_channels(c.space))),
)
