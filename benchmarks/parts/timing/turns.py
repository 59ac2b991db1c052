"""Timing and bookkeeping of the kernel benchmarks: medians of device time, and rows of CSV files."""

import csv
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bsnas.engine.host.atomic import write_atomically, write_error
from bsnas.engine.host.errors import UserError

RESULTS = Path(__file__).resolve().parents[2] / "results"


def device_milliseconds(run: Callable[[], Any], repeats: int = 7) -> float:
    """Median over repeats of one call's time on the GPU, the L2 cache flushed before each (50 MB on an H100)."""
    flush = torch.empty(2**26, dtype=torch.int32, device="cuda")
    run()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2]


def alternating_milliseconds(
    contenders: dict[str, Callable[[], Any]], *, cuda: bool, rounds: int, calls: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Milliseconds a call of each contender, `rounds` figures of `calls` calls, contenders in turn in every round.

    Host time of queued calls that end in a synchronisation: launches that the GPU waits for count. A turn begins with
    a call that is not timed, since caches and allocator are as the contender before left them, which no training sees.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def timed(run: Callable[[], Any], count: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            run()
        if cuda:
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start) / count

    slow = set()
    for name, run in contenders.items():
        for _ in range(warmup):
            first = timed(run, 1)
        if first > 1000:  # a contender that takes seconds needs no more digits
            slow.add(name)
            times[name].append(first)
    for _ in range(rounds):
        for name, run in contenders.items():
            if name not in slow:
                timed(run, 1)
                times[name].append(timed(run, calls))
    return times


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    ordered = sorted(values)
    return tuple(ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.2, 0.5, 0.8))  # type: ignore[return-value]


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV file, with a header where it is new; all rows have the same columns.

    Raises `UserError` when the file has other columns or cannot be written.
    """
    columns = list(rows[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="") as file:
            file.seek(0)
            held = next(csv.reader(file), columns)
            if held != columns:
                raise UserError(
                    f"{path} has the columns {', '.join(held)}, not {', '.join(columns)}; give another file"
                )
            new = file.seek(0, io.SEEK_END) == 0
            writer = csv.DictWriter(file, fieldnames=columns)
            if new:
                writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise write_error(path, error) from None


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as CSV with every column that any of them has; the file appears whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, text.getvalue().encode())
