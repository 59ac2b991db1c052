"""Disturb a small digits pipeline in every way that a cluster does, and check that nothing is lost.

python benchmarks/soak.py --json soak.json
python benchmarks/soak.py --kills 5 --terms 3 --mutations 100 --parts kills terms mutations

The pipeline trains, shrinks twice, evolves, retrains and exports. `kills`: SIGKILL at random moments. `terms`: SIGTERM,
where besides no optimizer step may be repeated. `damage`: files cut off, with a bit flipped, empty. `disk`: files that
cannot grow. `ranks`: one of two ranks killed or frozen. `nan`: no numbers on one rank. `mutations`: hypothesis changes
architectures, configurations, spaces and manifests. `images`: their bytes are spoilt before or after the check.
`stall`: how long checkpoints hold up training. Whatever is continued must end bit for bit as the undisturbed run.
"""

import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.benchmarks.parts.faults import soak_parts
from bsnas.benchmarks.parts.faults.hostile_images import hostile_images
from bsnas.benchmarks.parts.faults.soak_pipeline import Pipelines, Report
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures

PartName = Literal["kills", "terms", "damage", "disk", "ranks", "nan", "mutations", "images", "stall"]
ALL: tuple[PartName, ...] = ("mutations", "images", "stall", "nan", "disk", "ranks", "damage", "terms", "kills")


@dataclass(frozen=True, kw_only=True)
class SoakArguments:
    kills: int = 50
    """SIGKILLs that must hit."""
    terms: int = 20
    """SIGTERMs that must hit."""
    mutations: int = 1000
    """Mutated files of each kind."""
    images: int = 600
    """Image files that are spoilt, two thirds of them after their check."""
    parts: tuple[PartName, ...] = ALL
    """What is done, in this order."""
    seed: int = 0
    """Seed of moments, places and mutations."""
    gap: float = 6.0
    """Mean seconds from the start of a process until it is disturbed."""
    cold_share: float = 0.1
    """Share of the processes under SIGKILL that load their libraries themselves instead of being forked."""
    directory: Path | None = None
    """Where the runs go; by default a temporary directory, which is removed."""
    json: Path | None = None
    """File for all counts."""

    def __post_init__(self) -> None:
        if min(self.kills, self.terms, self.mutations) < 1 or not 0 < self.gap < 1000 or not 0 <= self.cold_share <= 1:
            raise UserError(
                f"kills {self.kills}, terms {self.terms}, mutations {self.mutations}, gap {self.gap}, cold share "
                f"{self.cold_share}: give counts of at least 1, a gap in seconds above 0 and a share from 0 to 1"
            )
        if self.images < 1:
            raise UserError(f"images {self.images}: give at least 1")


def main() -> None:
    arguments = parse(SoakArguments, __doc__, sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        directory = (arguments.directory or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        pipelines = Pipelines(directory, arguments.seed, arguments.gap)
        reports = {name: measure(name, pipelines, arguments) for name in arguments.parts}
    failures = [line for report in reports.values() for line in report.failures]
    figures = {
        name: {"counts": dict(report.counts), "seconds": report.seconds, "failures": report.failures}
        for name, report in reports.items()
    }
    write_figures(arguments.json, {"seed": arguments.seed, **provenance(), "failures": len(failures), "parts": figures})
    if failures:
        raise UserError(f"{len(failures)} checks failed; they are listed above")
    print(f"all {len(reports)} parts hold")


def measure(name: PartName, pipelines: Pipelines, arguments: SoakArguments) -> Report:
    """Do a part and print its counts."""
    parts: dict[PartName, soak_parts.Part] = {
        "kills": lambda: soak_parts.disturb(pipelines, signal.SIGKILL, arguments.kills, arguments.cold_share),
        "terms": lambda: soak_parts.disturb(pipelines, signal.SIGTERM, arguments.terms, 0),
        "damage": lambda: soak_parts.damage(pipelines),
        "disk": lambda: soak_parts.disk(pipelines),
        "ranks": lambda: soak_parts.ranks(pipelines),
        "nan": lambda: soak_parts.nan(pipelines),
        "mutations": lambda: soak_parts.mutations(pipelines, arguments.mutations),
        "images": lambda: hostile_images(pipelines.directory, arguments.images),
        "stall": lambda: soak_parts.stall(pipelines),
    }
    print(f"\n{name}", flush=True)
    began = time.perf_counter()
    report = parts[name]()
    report.seconds["in all"] = time.perf_counter() - began
    for what, count in report.counts.items():
        print(f"  {count:>6}  {what}")
    for what, seconds in report.seconds.items():
        print(f"  {seconds:8.2f}  seconds {what}")
    print(f"  {len(report.failures)} failures", flush=True)
    return report


if __name__ == "__main__":
    run(main)
