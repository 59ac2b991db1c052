"""Describe a search space without training: its size, its networks, its supernet, and what a run takes here.

python search/space.py my-space.toml
python search/space.py nas-bench-macro --picture space.svg
"""

import random
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import tyro

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.canonical import canonical
from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.limits import format_count
from bsnas.engine.space.sampling import uniform_arch
from bsnas.engine.space.space import Space
from bsnas.engine.space.spaces import space_at


@dataclass(frozen=True, kw_only=True)
class SpaceArguments:
    file: tyro.conf.Positional[str]
    """TOML file of a space, or the name of one of the package."""
    samples: int = 2000
    """Random networks of the histograms."""
    seed: int = 0
    """Seed of these networks."""
    preset: str | None = None
    """Preset whose training the estimated time is of; by default cifar10, or imagenet above 64 pixels."""
    images: int = 50_000
    """Training images of the estimate."""
    skip_time: bool = False
    """Do not measure how long a run takes here: that loads torch and trains for a few seconds."""
    picture: Path | None = None
    """File for a picture (SVG or PNG)."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.images < 1:
            raise UserError(f"samples {self.samples}, images {self.images}: each must be at least 1")
        if self.picture is not None and self.picture.suffix not in (".svg", ".png"):
            raise UserError(f"picture {self.picture}; give a file name that ends in .svg or .png")


def main() -> None:
    arguments = parse(SpaceArguments, __doc__, sys.argv[1:])
    space = space_at(arguments.file)
    rng = random.Random(arguments.seed)
    archs = [uniform_arch(space, rng) for _ in range(arguments.samples)]
    figures = describe(space, arguments.file, archs)
    if not arguments.skip_time:
        figures.update(describe_run(space, arguments.preset, arguments.images))
    if arguments.picture is not None:
        draw(space, arguments, archs)
    write_figures(arguments.json, figures)


def describe(space: Space, name: str, archs: list[Arch]) -> dict[str, Any]:
    """Print what is known without torch; returns it."""
    costs = CostModel(space)
    ranges = {"multiply-adds": costs.macs, "parameters": costs.params}
    figures: dict[str, Any] = {"architectures": str(space.num_architectures)}
    print(
        f"{name}: {space.num_blocks} blocks in {len(space.clusters)} clusters, images of {space.resolution}x"
        f"{space.resolution}, {space.springs} springs"
    )
    count = space.num_architectures
    counted = f"{count:,}" if count < 10**7 else f"{count:.4g}"
    print(f"{'architectures':15} {counted}; a round of fair sampling has {space.max_live} paths")
    if space.has_identities:
        # Every network has one canonical text, so the share of these among random texts is that of networks.
        share = sum(canonical(space, arch) == arch for arch in archs) / len(archs)
        print(f"{'':15} about {share:.0%} of these texts are different networks, by {len(archs):,} random ones")
        figures["distinct_share"] = share
    for title, cost in ranges.items():
        low, high = cost.range()
        figures[title] = [int(low), int(high)]
        print(f"{title:15} {format_count(low)} to {format_count(high)}")
    from bsnas.search.reporting.space import text_histogram

    print(f"{'':15} of {len(archs):,} random networks:")
    print(*(f"{'':6}{line}" for line in text_histogram([costs.macs(arch) for arch in archs])), sep="\n")
    return figures


def describe_run(space: Space, preset_name: str | None, images: int) -> dict[str, Any]:
    """Print what the supernet takes, and how long training and shrinking it would last here; returns it."""
    from bsnas.engine.presets import preset, with_space
    from bsnas.search.run_time import estimate

    config = with_space(preset(preset_name or ("imagenet" if space.resolution > 64 else "cifar10")), space)
    found = estimate(config, images)
    mib = found.parameters * 8 / 2**20
    print(f"{'supernet':15} {format_count(found.parameters)} parameters; {mib:,.0f} MiB with momentum")
    training, scoring = duration(found.training_seconds), duration(found.scoring_seconds)
    print(
        f"{'time here':15} about {training} of training ({config.shrink.total_epochs} epochs of {images:,} images) and "
        f"{scoring} of scoring\n{'':15} ({found.models:,} subnets), by the preset {config.preset}"
    )
    return {
        "supernet_parameters": found.parameters,
        "training_seconds": found.training_seconds,
        "scoring_seconds": found.scoring_seconds,
    }


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `5.3 h` or `3.1 days`."""
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3600 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:,.1f} days"


def draw(space: Space, arguments: SpaceArguments, archs: list[Arch]) -> None:
    from bsnas.search.reporting.space import space_picture

    costs, file = CostModel(space), arguments.picture
    assert file is not None
    picture = space_picture(space, arguments.file, [costs.macs(a) for a in archs], [costs.params(a) for a in archs])
    try:
        if file.suffix == ".png":
            picture.save_png(file)
        else:
            write_atomically(file, picture.svg().encode())
    except OSError as error:
        raise UserError(f"picture {file} cannot be written: {error.strerror}; choose another --picture") from None
    print(f"{'picture':15} {file}")


if __name__ == "__main__":
    run(main)
