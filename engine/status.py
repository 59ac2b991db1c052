"""Say what a run is doing now, from its files alone.

python engine/status.py --run runs/digits
python engine/status.py --run runs/digits --follow

Nothing is locked, written or imported that could disturb the process at work; its lock is looked up in the system's
table of locks. Works on any machine that sees the run directory.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.console import duration
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.facts import Row, RunFacts

STALE_SECONDS = 120
"""After this time without a note, the line says how old the last one is."""


@dataclass(frozen=True, kw_only=True)
class StatusArguments:
    run: Path
    """Run directory."""
    follow: bool = False
    """Say it again whenever it changes, until nothing works on the run."""
    json: Path | None = None
    """File for the same as figures."""


def main() -> None:
    arguments = parse(StatusArguments, __doc__, sys.argv[1:])
    status = read_status(RunFacts(arguments.run))
    write_figures(arguments.json, status)
    print("\n".join(lines(status)))
    while arguments.follow and status["running"]:
        time.sleep(2)
        before, status = status, read_status(RunFacts(arguments.run))
        write_figures(arguments.json, status)
        if now(status) != now(before):
            print(now(status), flush=True)


def read_status(facts: RunFacts) -> dict[str, Any]:
    """What the files say, as plain data."""
    owner = facts.directory.owner()
    running = owner is not None and owner.alive
    commands = facts.commands
    return {
        "run": str(facts.directory.path),
        "running": running,
        "owner": owner.text if owner is not None and running else None,
        "owner_elsewhere": owner is not None and owner.elsewhere,
        "script": commands[-1]["script"] if commands else None,
        "activity": facts.activity if running else None,
        "last_outcome": None if running or not commands else commands[-1].get("outcome", "killed"),
        "last_change": facts.last_change(),
        "phases": [{"phase": phase, "state": text} for phase, text in phases(facts)],
        "next": next_command(facts),
        "damaged": facts.damaged,
    }


def phases(facts: RunFacts) -> Iterator[tuple[str, str]]:
    """Every phase of a search with how far it is."""
    epochs = facts.epochs
    done = epochs[-1]["epoch"] if epochs else 0
    shrink = facts.config.shrink
    text = f"{done} of {shrink.total_epochs} epochs"
    if epochs:
        text += f", loss {epochs[-1]['loss']:.4f}, top-1 {epochs[-1]['top1']:.2%}"
    yield "training", text
    steps = len(facts.spaces) - 1
    text = f"{steps} of {len(shrink.step_epochs)} steps, {facts.spaces[-1].num_architectures:,.4g} architectures left"
    upcoming = [epoch for epoch in shrink.step_epochs[steps:] if epoch >= done]
    yield "shrinking", text + (f", next at epoch {upcoming[0]}" if upcoming else "")
    if facts.searches:
        search = facts.searches[-1]
        generations = f"{len(search.generations) - 1} of {search.settings.get('iterations', '?')} generations"
        limits = ", ".join(search.limits.values()) or "no limits"
        best = max((row["top1"] for row in search.rows), default=float("nan"))
        yield "search", f"{generations} ({limits}), {len(search.rows):,} subnets, best one-shot top-1 {best:.2%}"
    else:
        yield "search", "not started"
    yield "finals", _finals(facts)
    yield "retraining", _retraining(facts)
    yield "export", ", ".join(file.name for file in facts.exports) or "not done"
    measured = [row for row in facts.latency.get("rows", []) if "p50_ms" in row]
    yield "latency", f"{len(measured)} rows measured" if measured else "not measured"


def _finals(facts: RunFacts) -> str:
    rungs = facts.finals.get("rungs", [])
    if not rungs:
        return "not held"
    best = rungs[-1]["networks"][0]
    left = "" if facts.finals.get("winner") else ", to be continued"
    return f"{len(rungs)} rungs, best top-1 {best['top1']:.2%} after {rungs[-1]['epochs']} epochs{left}"


def _retraining(facts: RunFacts) -> str:
    text = f"{facts.retrain_epochs[-1]['epoch']} epochs" if facts.retrain_epochs else "not started"
    if facts.retrained:
        text += f", test top-1 {facts.retrained['test_top1']:.2%} on {facts.retrained['test_images']} images"
    return text


def next_command(facts: RunFacts) -> str | None:
    """The command that continues the run, when nothing works on it."""
    where = f"--run {facts.directory.path}"
    if not facts.epochs or facts.epochs[-1]["epoch"] < facts.config.shrink.total_epochs:
        return f"python engine/train.py {where} --resume"
    if not facts.best:
        return f"python search/evolve.py {where} --max-macs ..."
    if not facts.retrained:
        return f"python engine/retrain.py {where}"
    return f"python search/report.py {where}"


def lines(status: dict[str, Any]) -> Iterator[str]:
    """The status as text."""
    yield f"{status['run']}, last change {ago(status['last_change'])}"
    yield now(status)
    width = max(len(row["phase"]) for row in status["phases"])
    for row in status["phases"]:
        yield f"  {row['phase']:<{width}}  {row['state']}"
    for problem in status["damaged"]:
        yield f"unreadable: {problem}"
    if not status["running"] and status["next"]:
        yield f"next: {status['next']}"


def now(status: dict[str, Any]) -> str:
    """One line: what is being done, how far, the time left; or how the last command ended."""
    if not status["running"]:
        if status["last_outcome"] is None:
            return "nothing is running"
        return f"nothing is running; the last command, {status['script']}, ended: {status['last_outcome']}"
    where = ", on another machine, which may have died" if status["owner_elsewhere"] else ""
    activity = status["activity"]
    if activity is None:
        return f"running: {status['script'] or 'a command'} ({status['owner']}{where})"
    return f"running: {progress(activity)} ({status['owner']}{where})"


def progress(activity: Row) -> str:
    """`training 12.5 of 54 epochs, 23 %, 1:10 left`."""
    done, total = activity["done"], activity["total"]
    text = activity["doing"]
    if total:
        text += f", {done:,.5g} of {total:,.5g} {activity['unit']}".rstrip() + f", {done / total:.0%}"
        elapsed = activity["time"] - activity["started"]
        if done:
            text += f", {duration(elapsed / done * (total - done))} left"
    if "loss" in activity:
        text += f", loss {activity['loss']:.4f}, {activity['images_per_s']:,.0f} images/s"
    age = time.time() - activity["time"]
    return text + (f", said {ago(activity['time'])}" if age > STALE_SECONDS else "")


def ago(seconds_since_1970: float) -> str:
    """`12 s ago`, `3 min ago`, ..."""
    seconds = max(0.0, time.time() - seconds_since_1970)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    run(main)
