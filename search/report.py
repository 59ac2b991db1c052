"""Write the report of a run: one self-contained report.html, and its pictures and tables as files.

python search/report.py --run runs/digits
python search/report.py --run runs/digits --watch 10
python search/report.py --run runs/digits --run runs/other

The run may be in progress: nothing in it is locked or changed, and the page reloads itself as long as something works
on the run. With --watch it is also written anew, until the work ends. Two runs are set side by side, with differences
marked.
"""

import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

import tyro

from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.facts import RunFacts
from bsnas.search.reporting.build import write_report, write_until_done
from bsnas.search.reporting.compare import write_comparison


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    run: tyro.conf.UseAppendAction[tuple[Path, ...]]
    """Run directory; give the option twice to compare two runs."""
    output: Path | None = None
    """Page to write; by default report.html in the (first) run directory. Files go into a directory beside it."""
    watch: float | None = None
    """Write the report again every so many seconds, until no process works on the run."""
    json: Path | None = None
    """File for the figures of this report: its size and the time that it took."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.run) <= 2:
            raise UserError(f"{len(self.run)} runs given; give --run once, or twice to compare two")
        if self.watch is not None and (self.watch <= 0 or len(self.run) > 1):
            raise UserError(f"--watch {self.watch}: give seconds above 0 and a single --run")


def main() -> None:
    arguments = parse(ReportArguments, __doc__, sys.argv[1:])
    started = time.perf_counter()
    files = write(arguments)
    figures: dict[str, Any] = {
        "report": str(files[0]),
        "bytes": files[0].stat().st_size,
        "files": len(files),
        "seconds": time.perf_counter() - started,
    }
    write_figures(arguments.json, figures)
    print(f"report in {files[0]} ({figures['bytes'] / 1e6:.2f} MB), pictures and tables in {files[0].with_suffix('')}")


def write(arguments: ReportArguments) -> list[Path]:
    first = RunFacts(arguments.run[0])
    if len(arguments.run) == 2:
        second = RunFacts(arguments.run[1])
        file = arguments.output or first.directory.path / f"report-vs-{second.directory.path.name}.html"
        return write_comparison([first, second], file.absolute())
    file = (arguments.output or first.directory.report_file).absolute()
    if arguments.watch is not None:
        return write_until_done(first.directory.path, file, arguments.watch)
    return write_report(first, file)


if __name__ == "__main__":
    run(main)
