"""Compare public tables of networks with this project: what each network costs, and how well one-shot scores rank them.

python benchmarks/tabular.py --table nas-bench-macro_cifar10.json --check-costs --json costs.json
python benchmarks/tabular.py --table nas-bench-macro_cifar10.json --run runs/nas-bench --half choose --json ranking.json
python benchmarks/tabular.py --table nas-bench-macro_cifar10.json --run runs/fair --method fair-channels-decay-crop \
    --images cifar10 --half choose --rows rows.csv

The space of a table is recognised. --check-costs compares multiply-adds and parameters of every row. --run scores all
different networks with the weights of a supernet of that space, trained without shrinking, and says how well the scores
rank them: over all, and among those of about 40, 60 and 80 M multiply-adds, where size decides nothing; what a search
by these scores finds at each budget; and beside it, what multiply-adds, parameters and random searches come to.
Settings are chosen on one half of the networks and reported on the other. With --images the supernet is trained first,
by a method of benchmarks/parts/tabular/methods.py.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("bsnas") is None:
    print("error: bsnas is not installed in this Python; run `make env`, then use .venv/bin/python", file=sys.stderr)
    sys.exit(2)

from bsnas.engine.host.preemption import handle_signals

if __name__ == "__main__":
    handle_signals()  # before the imports below, which take seconds

from bsnas.benchmarks.parts.tabular.corrected import corrected
from bsnas.benchmarks.parts.tabular.finals import finals, print_finals
from bsnas.benchmarks.parts.tabular.methods import (
    AUGMENTATIONS,
    DECAYS,
    FRACTION,
    METHODS,
    PASSES,
    RULES,
    SHARINGS,
    train,
)
from bsnas.benchmarks.parts.tabular.public_table import PublicTable
from bsnas.benchmarks.parts.tabular.ranking import BUDGETS, Half, against_the_best, ceilings, in_half, ranking
from bsnas.benchmarks.parts.tabular.scored_run import check_run, search_budgets
from bsnas.benchmarks.parts.tabular.trained_finals import hold_finals, judged
from bsnas.benchmarks.parts.tabular.worth import print_worth, worth
from bsnas.benchmarks.parts.timing.provenance import provenance
from bsnas.benchmarks.parts.timing.turns import append_rows, write_csv
from bsnas.engine.config import ScoreName
from bsnas.engine.evaluation.evaluator import BatchNormMode
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.distributed import Process, entered_by_main, start_process
from bsnas.engine.host.errors import UserError
from bsnas.engine.host.script import parse, run, write_figures
from bsnas.engine.runs.commands import recorded
from bsnas.engine.runs.facts import RunFacts
from bsnas.engine.space.arch import Arch
from bsnas.search.algorithms.correction import LEAST
from bsnas.search.algorithms.evolution import EvolutionConfig, by_loss, by_top1


@dataclass(frozen=True, kw_only=True)
class TabularArguments:
    table: Path
    """JSON file of a public table."""
    check_costs: bool = False
    """Compare multiply-adds and parameters of every row with this project's."""
    run: Path | None = None
    """Run directory of a supernet of the table's space: rank the table's networks by its scores."""
    images: Path | None = None
    """Images of the table (train/CLASS, val/CLASS): train the supernet of --method in --run, unless it is trained."""
    seed: int = 0
    """Seed of that training."""
    passes: int = PASSES
    """Its length: passes over the training images, those of all paths counted."""
    half: Half | None = None
    """Rank the networks whose codes have an even CRC-32 (choose) or an odd one (report); by default all."""
    bn: BatchNormMode | None = None
    """Statistics of scored subnets; by default as in the run's shrink steps."""
    score: ScoreName | None = None
    """What ranks subnets in the search and in --rows, top-1 or mean loss; by default as in the run's shrink steps."""
    population: int = 75
    """Architectures in a generation of the search; the defaults are search/evolve.py's."""
    iterations: int = 20
    """Generations after the first, random one."""
    corrections: tuple[int, ...] = ()
    """Also rank by corrections that learn from one training in the table of so many networks, as 14 30 50."""
    finals: bool = False
    """Also hold finals by the table's trainings: of the best by score, then of the best by a correction."""
    train_finals: tuple[int, ...] = ()
    """Also hold the finals of the searches at these budgets by trainings of their own, as 60; in --run, resumable."""
    scores: Path | None = None
    """File for the scores of every network that was ranked (CSV)."""
    rows: Path | None = None
    """CSV file to which a line with the main figures is appended."""
    method: str | None = None
    """How the supernet was trained, in a word, for that line; one of those known with --images."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        if not self.check_costs and self.run is None:
            raise UserError("nothing was asked for; give --check-costs, or --run with a trained supernet")
        sizes_given = (self.population, self.iterations) != (TabularArguments.population, TabularArguments.iterations)
        about_scores = (
            self.half,
            self.bn,
            self.score,
            self.scores,
            self.rows,
            self.images,
            self.corrections,
            self.finals,
            self.train_finals,
            sizes_given,
        )
        if self.run is None and any(about_scores):
            raise UserError(
                "--half, --bn, --score, --population, --iterations, --corrections, --finals, --train-finals, --scores, "
                "--rows and --images are about the scores of a run; give --run, or leave them out"
            )
        if self.images is not None and self.method not in METHODS:
            raise UserError(
                f"--images with --method {self.method}; allowed are {'|'.join(RULES)}-{'|'.join(SHARINGS)}-"
                f"{'|'.join(DECAYS)}-{'|'.join(AUGMENTATIONS)}, as {FRACTION[0]}"
            )
        if not set(self.train_finals) <= set(BUDGETS):
            raise UserError(
                f"--train-finals {' '.join(map(str, self.train_finals))}; give some of {', '.join(map(str, BUDGETS))}"
            )
        if self.passes < 1:
            raise UserError(f"--passes {self.passes}; give at least 1")
        if bool(self.rows or self.images) != bool(self.method):
            raise UserError("--rows and --method belong together; give both or neither")


def main() -> None:
    arguments = parse(TabularArguments, __doc__, sys.argv[1:])
    process = start_process() if arguments.run is not None else None
    table = PublicTable.read(arguments.table)
    is_main = process is None or process.is_main
    figures: dict[str, Any] = {"table": arguments.table.name, "space": table.name, "rows": len(table.rows)}
    figures["distinct"] = len(table.distinct)
    if is_main:
        print(
            f"{arguments.table.name}: {figures['rows']:,} networks of the space {table.name}, "
            f"{figures['distinct']:,} different"
        )
    if arguments.check_costs and is_main:
        figures["mismatches"] = count_mismatches(table)
    if arguments.run is not None and process is not None:
        if arguments.images is not None and arguments.method is not None:
            train(
                arguments.method,
                table.space,
                arguments.images,
                arguments.seed,
                arguments.run,
                process,
                arguments.passes,
            )
        figures |= rank_by_run(table, arguments.run, arguments, process)
    if is_main:
        write_figures(arguments.json, figures)
    if figures.get("mismatches"):
        sys.exit(1)


def count_mismatches(table: PublicTable) -> int:
    """Rows with other costs than here, the first of which are shown."""
    mismatches = list(table.mismatches())
    for row, macs, params in mismatches[:5]:
        print(
            f"{row.code}: {row.macs} multiply-adds and {row.params} parameters in the table, {macs} and {params} here"
        )
    print(f"{len(mismatches):,} rows with other costs than here")
    return len(mismatches)


def rank_by_run(table: PublicTable, path: Path, arguments: TabularArguments, process: Process) -> dict[str, Any]:
    """Score on all ranks, rank and search. Returns figures of --json; on the main process alone."""
    trained = TrainedRun.open(path, process)
    config = EvolutionConfig.scaled(
        population=arguments.population, iterations=arguments.iterations, seed=trained.config.seed
    )
    check_run(trained, table)
    with entered_by_main(process, trained.run.lock()), recorded(trained.run, "tabular", device=process.device):
        networks = {arch: row for arch, row in table.distinct.items() if in_half(row, arguments.half)}
        wrong = [count for count in arguments.corrections if not LEAST <= count < len(networks)]
        if wrong:
            raise UserError(
                f"corrections from {', '.join(map(str, wrong))} networks; give numbers from {LEAST} to less than the "
                f"{len(networks)} that are ranked"
            )
        evaluator = trained.evaluator(arguments.bn)
        rows, scores = list(networks.values()), evaluator.evaluate(list(networks))
        score = arguments.score or trained.config.shrink.score
        found = search_budgets(evaluator, networks, config, by_loss if score == "loss" else by_top1)
        held = {budget: hold_finals(trained, found[budget]) for budget in arguments.train_finals if budget in found}
    if not process.is_main:
        return {}
    values = [-one.loss if score == "loss" else one.top1 for one in scores]
    best = {budget: networks[latest.ranked[0].arch] for budget, latest in found.items()}
    found_rows = {budget: against_the_best(rows, row, budget) for budget, row in best.items()}
    figures = {
        "half": arguments.half,
        "bn": evaluator.bn,
        "score": score,
        "seed": trained.config.seed,
        "networks": len(rows),
        **ranking(rows, [score.top1 for score in scores]),
        **ranking(rows, [-score.loss for score in scores], name="loss"),
        **ranking(rows, [row.macs for row in rows], name="macs"),
        **ranking(rows, [row.params for row in rows], name="params"),
        **ranking(rows, [blocks_of(arch) for arch in networks], name="blocks"),
        **ceilings(rows),
        "regret": {budget: row["regret"] for budget, row in found_rows.items()},
        "rank": {budget: row["rank"] for budget, row in found_rows.items()},
        "budgets": found_rows,
        "corrections": [corrected(table.space, networks, scores, count) for count in arguments.corrections],
        "finals": finals(table.space, networks, scores, values) if arguments.finals else [],
        "trained_finals": [judged(table.space, one, networks, scores, budget) for budget, one in held.items()],
        "worth": worth(table.space, networks, [score.top1 for score in scores]),
        **provenance(),
    }
    print_worth(figures["worth"], table.space)
    print_ranking(figures)
    if figures["finals"]:
        print_finals(figures["finals"])
    for row in figures["trained_finals"]:
        print(
            f"finals at {row['budget']} M by {row['trained']} trainings, {row['epochs']} epochs in all: {row['code']} "
            f"with {row['accuracy']:.2f} %, rank {row['rank']} of {row['networks']}, regret {row['regret']:.2f}"
        )
        if "tau" in row:
            print(f"a correction from them has tau {row['tau']:.3f}, inside bands {row['tau_bands']:.3f}")
    if arguments.scores is not None:
        pairs = zip(rows, scores, strict=True)
        lines = [{"code": r.code, "top1": round(s.top1, 6), "loss": round(s.loss, 6)} for r, s in pairs]
        write_csv(arguments.scores, lines)
    if arguments.rows is not None:
        line = line_of(table, figures, trained, arguments)
        more = [further_line(line, how, row) for key, how in FURTHER.items() for row in figures[key]]
        append_rows(arguments.rows, [line, *more])
    return figures


def blocks_of(arch: Arch) -> int:
    """How many blocks are no identity."""
    return sum(op.block_op.kernel > 0 for op in arch.operations)


def print_ranking(figures: Mapping[str, Any]) -> None:
    """A line for each score, and one for each budget."""
    print(f"\n{figures['networks']:,} networks ranked; tau over all, and inside bands of multiply-adds")
    for title, name in (
        ("one-shot top-1", ""),
        ("one-shot loss", "_loss"),
        ("MACs", "_macs"),
        ("parameters", "_params"),
        ("blocks", "_blocks"),
    ):
        overall, bands = figures[f"tau{name}"], figures[f"tau{name}_bands"]
        (low, high), (band_low, band_high) = figures[f"tau{name}_interval"], figures[f"tau{name}_bands_interval"]
        print(f"{title:15}{overall:7.3f} ({low:.3f} to {high:.3f}){bands:9.3f} ({band_low:.3f} to {band_high:.3f})")
    print(f"{'no score passes':15}{figures['ceiling']:7.3f}{'':17}{figures['ceiling_bands']:9.3f}")
    for budget in sorted(set(BUDGETS) - figures["budgets"].keys()):
        print(f"at {budget} M: the search met none of the networks that are ranked")
    for row in figures["corrections"]:
        regrets = ", ".join(f"{row[f'regret_{budget}']:.2f}" for budget in BUDGETS if f"regret_{budget}" in row)
        (low, high), (band_low, band_high) = row["tau_range"], row["tau_bands_range"]
        print(
            f"{row['trained']:3} trained    {row['tau']:7.3f} ({low:.3f} to {high:.3f}){row['tau_bands']:9.3f} "
            f"({band_low:.3f} to {band_high:.3f})  regret {regrets}"
        )
    for budget, row in figures["budgets"].items():
        random = ", ".join(f"{regret:.2f} of {count}" for count, regret in row["random"].items())
        print(
            f"at {budget} M: {row['code']} with {row['accuracy']:.2f} %, rank {row['rank']} of {row['networks']}, "
            f"regret {row['regret']:.2f}; the best random one: {random}"
        )


def line_of(
    table: PublicTable, figures: Mapping[str, Any], trained: TrainedRun, arguments: TabularArguments
) -> dict[str, Any]:
    """The main figures, with how long the supernet trained, and the command that gives them."""
    suffix = "_loss" if figures["score"] == "loss" else ""
    trainings = [command for command in RunFacts(trained.run.path).commands if command["script"] == "train"]
    return {
        "table": table.name,
        "half": figures["half"] or "all",
        "method": method_of(arguments),
        "seed": figures["seed"],
        **cells(
            {"tau": figures[f"tau{suffix}"], "tau_bands": figures[f"tau{suffix}_bands"]}
            | {f"regret_{budget}": regret for budget, regret in figures["regret"].items()}
        ),
        "minutes": round(sum(command.get("seconds", 0) for command in trainings) / 60, 1),
        "command": repeating(arguments, figures) if arguments.images else trainings[0]["command"] if trainings else "",
        "commit": figures["commit"],
    }


FURTHER = {
    "corrections": "corrected by {} trainings",
    "finals": "finals of {} trainings",
    "trained_finals": "finals of {} own trainings",
}
"""Figures that have lines of their own, and what these say behind the method."""


def method_of(arguments: TabularArguments) -> str | None:
    """With its length where that is not the usual one."""
    if arguments.method is None or arguments.passes == PASSES:
        return arguments.method
    return f"{arguments.method}, {arguments.passes} passes"


def further_line(line: Mapping[str, Any], how: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a correction, or of finals."""
    return {**line, "method": f"{line['method']}, {how.format(row['trained'])}", **cells(row)}


def cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """Taus and regrets of a line, empty where there are none."""
    places = {"tau": 4, "tau_bands": 4} | {f"regret_{budget}": 3 for budget in BUDGETS}
    return {key: round(row[key], digits) if key in row else "" for key, digits in places.items()}


def repeating(arguments: TabularArguments, figures: Mapping[str, Any]) -> str:
    """The command without the paths of this machine."""
    words = ["python benchmarks/tabular.py", "--table", arguments.table.name, "--images", "IMAGES", "--run", "RUN"]
    words += ["--method", str(arguments.method), "--seed", str(figures["seed"])]
    words += ["--passes", str(arguments.passes)] if arguments.passes != PASSES else []
    words += ["--half", arguments.half] if arguments.half else []
    words += ["--population", str(arguments.population), "--iterations", str(arguments.iterations)]
    words += ["--finals"] if arguments.finals else []
    words += ["--train-finals", *map(str, arguments.train_finals)] if arguments.train_finals else []
    words += ["--corrections", *map(str, arguments.corrections)] if arguments.corrections else []
    return " ".join([*words, "--bn", figures["bn"], "--score", figures["score"], "--rows", "ROWS"])


if __name__ == "__main__":
    run(main)
