"""How many training images a second does the loader give, against bare DALI, torchvision, webdataset and ffcv?

python benchmarks/loader.py
python benchmarks/loader.py --cases photographs --rounds 9 --json loader.json

On the CPU, in one run and on the same cores: every contender has as many threads or workers as there are cores. The
photographs are generated (see benchmarks/parts/loading/photographs.py); the resized copy is the one that
engine/prepare.py --resize 256 writes. Contenders take turns in every round; figures are medians over rounds, ratios are
taken within a round.
"""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, Literal

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from rich.console import Console
from rich.table import Table

from bsnas.benchmarks.parts.loading import contenders as loader_contenders
from bsnas.benchmarks.parts.loading import peers as loader_peers
from bsnas.benchmarks.parts.loading.contenders import Contender
from bsnas.benchmarks.parts.loading.photographs import write_photographs, write_resized
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.engine.data.dataset import DataConfig, open_dataset
from bsnas.engine.data.file_list import FileList
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures

CONTENDERS: dict[str, Callable[[FileList, DataConfig, int], Contender]] = {
    "ours": loader_contenders.ours,
    "bare_dali": loader_contenders.bare_dali,
    "torchvision_pil": loader_contenders.torchvision_pil,
    "torchvision_decode_jpeg": loader_contenders.torchvision_decode_jpeg,
    "webdataset": loader_peers.webdataset,
    "ffcv": loader_peers.ffcv,
}
Case = Literal["photographs", "resized", "resized-plain", "digits"]
CASES: tuple[Case, ...] = ("photographs", "resized", "resized-plain", "digits")
WARMUP_BATCHES = 6  # more than any contender holds ready, so that the timed ones are made while the clock runs
PREFETCH = 2
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True, kw_only=True)
class LoaderArguments:
    """Measure the training loader."""

    cases: tuple[Case, ...] = CASES
    """Image sets: photographs of 500x375; their copy with a shorter side of 256, also with `--data.no-antialias` in
    ours and in bare DALI (the peers go on filtering); digits of 8x8."""
    images: int = 512
    """Photographs to generate."""
    batch_size: int = 64
    """Images per batch."""
    batches: int = 60
    """Timed batches per contender and round; ten times as many on digits."""
    rounds: int = 5
    """Rounds, in each of which every contender runs once."""
    threads: int = 0
    """Threads or worker processes of every contender; 0 takes one per core."""
    cache_dir: str = "~/.cache/bsnas"
    """Where the images are kept."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.batches, self.rounds) < 1 or self.threads < 0 or not self.cases:
            raise UserError(
                "batch_size, batches and rounds must be at least 1, threads at least 0, and cases not empty"
            )
        if self.images < 2 * self.batch_size:
            raise UserError(
                f"{self.images} images are too few for batches of {self.batch_size}; give at least twice that"
            )


def main() -> None:
    arguments = parse(LoaderArguments, __doc__, sys.argv[1:])
    console = Console()
    cases = {}
    for case in arguments.cases:
        console.print(f"{case}: {arguments.rounds} rounds of every loader")
        files, config = open_case(case, arguments)
        cases[case] = {"bytes_per_image": int(files.sizes.mean()), **compare(files, config, arguments, case)}
        console.print(table(cases[case]))
        for name, why in cases[case]["missing"].items():
            console.print(f"{name} did not run: {why}")
    figures: dict[str, Any] = {**provenance(), "cores": len(os.sched_getaffinity(0)), "cases": cases}
    figures |= {key: value for key, value in cases.get("photographs", {}).items() if key != "bytes_per_image"}
    if "resized" in cases:
        figures["resized_speedup_vs_torchvision"] = cases["resized"]["speedup_vs_torchvision"]
    if "resized-plain" in cases:
        figures["resized_plain_speedup_vs_torchvision"] = cases["resized-plain"]["speedup_vs_torchvision"]
    if "resized" in cases and "photographs" in cases:
        ours = cases["resized"]["images_per_s"]["ours"]
        originals = cases["photographs"]["images_per_s"]["torchvision_pil"]
        figures["resized_speedup_vs_torchvision_on_originals"] = ours / originals
    write_figures(arguments.json, figures)


def open_case(case: Case, arguments: LoaderArguments) -> tuple[FileList, DataConfig]:
    """The training files of a case and how they are augmented."""
    cache = Path(arguments.cache_dir).expanduser()
    threads = arguments.threads or len(os.sched_getaffinity(0))
    if case == "digits":
        config = DataConfig(cache_dir=str(cache), resolution=16, pad=1, threads=threads, prefetch=PREFETCH)
        return open_dataset(config).train, config
    root = write_photographs(cache / "benchmark" / f"photographs-{arguments.images}", arguments.images)
    if case != "photographs":
        root = write_resized(root, cache / "benchmark" / f"resized-{arguments.images}")
    config = DataConfig(
        source="folder",
        path=str(root),
        cache_dir=str(cache),
        resolution=224,
        resize=256,
        val_per_class=1,
        augment="resized-crop",
        flip=True,
        antialias=case != "resized-plain",
        threads=threads,
        prefetch=PREFETCH,
        **IMAGENET,  # type: ignore[arg-type]
    )
    return open_dataset(config).train, config


@dataclass(frozen=True)
class Measured:
    """One run of a contender."""

    images_per_s: float
    cpu_ms_per_image: float
    """Over all its processes."""
    first_batch_s: float
    """From its construction in a fresh process, imports aside, to its first batch."""
    memory_mib: float
    """Peak resident memory, added up over its processes."""


def compare(files: FileList, config: DataConfig, arguments: LoaderArguments, case: Case) -> dict[str, Any]:
    """Figures per contender, the ratios that matter, and why a contender did not run."""
    batches = arguments.batches * (10 if case == "digits" else 1)
    missing = {name: why for name in CONTENDERS if (why := loader_peers.why_missing(name))}
    present = [name for name in CONTENDERS if name not in missing]
    if "webdataset" in present:
        loader_peers.webdataset_shards(files, config)
    rows: dict[str, list[Measured]] = {name: [] for name in present}
    for _ in range(arguments.rounds):
        for name in present:
            # A process of its own: no contender meets threads, memory or imports of another.
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                rows[name].append(alone.submit(measure, name, files, config, arguments.batch_size, batches).result())

    def over_rounds(field: str) -> dict[str, float]:
        return {name: median(getattr(row, field) for row in rounds) for name, rounds in rows.items()}

    def ratio(peer: str) -> float:
        pairs = zip(rows["ours"], rows[peer], strict=True)
        return median(own.images_per_s / other.images_per_s for own, other in pairs)

    return {
        **{field.name: over_rounds(field.name) for field in fields(Measured)},
        "speedup_vs_torchvision": ratio("torchvision_pil"),
        "speedup_vs_torchvision_decode_jpeg": ratio("torchvision_decode_jpeg"),
        "share_of_bare_dali": ratio("bare_dali"),
        "speedups": {name: ratio(name) for name in present if name != "ours"},
        "missing": missing,
    }


def measure(name: str, files: FileList, config: DataConfig, batch_size: int, batches: int) -> Measured:
    """Run one contender, after batches that are not timed."""
    began = time.perf_counter()
    contender = CONTENDERS[name](files, config, batch_size)
    next(contender.batches)
    first = time.perf_counter() - began
    for _ in range(WARMUP_BATCHES - 1):
        next(contender.batches)
    cpu, clock = cpu_seconds(contender.worker_pids), time.perf_counter()
    for _ in range(batches):
        next(contender.batches)
    seconds, cpu = time.perf_counter() - clock, cpu_seconds(contender.worker_pids) - cpu
    images = batches * batch_size
    memory = sum(peak_mib(pid) for pid in (os.getpid(), *contender.worker_pids))
    return Measured(images / seconds, 1000 * cpu / images, first, memory)


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


def cpu_seconds(worker_pids: list[int]) -> float:
    """CPU time that this process and its workers have used."""
    ticks = 0
    for pid in worker_pids:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # utime and stime
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def table(figures: dict[str, Any]) -> Table:
    """Contenders as rows."""
    title = f"{figures['bytes_per_image'] / 1000:.1f} KB an image"
    columns = ("images/s", "CPU ms/image", "first batch s", "memory MiB", "ours is")
    result = Table("loader", *columns, title=title)
    speed = figures["images_per_s"]
    for name in speed:
        result.add_row(
            name,
            f"{speed[name]:.0f}",
            f"{figures['cpu_ms_per_image'][name]:.3f}",
            f"{figures['first_batch_s'][name]:.2f}",
            f"{figures['memory_mib'][name]:.0f}",
            f"{figures['speedups'].get(name, 1):.2f}x",
        )
    return result


if __name__ == "__main__":
    run(main)
