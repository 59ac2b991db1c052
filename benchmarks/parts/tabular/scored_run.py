"""Whether a run can score a table's networks, and what a search by its scores finds of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bsnas.benchmarks.parts.tabular.public_table import PublicTable, Row
from bsnas.benchmarks.parts.tabular.ranking import BUDGETS
from bsnas.engine.evaluation.evaluator import Evaluator, Score
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig, Valued, by_top1, ranked
from bsnas.search.runs.history import LatestSearch
from bsnas.search.runs.search import generations


def check_run(trained: TrainedRun, table: PublicTable) -> None:
    """Raise `UserError` where the run is not of the table's space, or the table has no accuracies."""
    given, wanted = trained.supernet.space, table.space
    if replace(given, classes=wanted.classes, springs=wanted.springs) != wanted:
        raise UserError(
            f"{trained.run.path} has another space than {table.name}, or was shrunk; train one with "
            f"engine/train.py --space {table.name} --shrink.keep"
        )
    trainings = len(table.rows[0].accuracies)
    if trainings == 0 or any(len(row.accuracies) != trainings for row in table.rows):
        raise UserError(
            f"the table of {table.name} has networks without accuracies, so nothing to rank by; give one "
            "whose entries have test_acc or acc, or --check-costs alone"
        )


def candidates_of(archs: Iterable[Arch], scores: Sequence[Score]) -> list[Candidate]:
    """As a search would have them; costs, which a table tells, are left out."""
    return [Candidate(arch, {}, one.top1, one.top5, one.loss) for arch, one in zip(archs, scores, strict=True)]


def search_budgets(
    evaluator: Evaluator, rows: Mapping[Arch, Row], config: EvolutionConfig, valued: Valued = by_top1
) -> dict[int, LatestSearch]:
    """By budget, what the paper's search, which looks at the whole space, found of `rows`.

    A budget is left out where the search met none of them, or the space has nothing inside.
    """
    found = {}
    for budget in BUDGETS:
        limit = Limit("macs", high=budget * 1e6)
        problem = Problem.of(evaluator.supernet.space, (limit,))
        if problem.costs["macs"].range()[0] > budget * 1e6:
            continue
        first, *later = [
            [candidate for candidate in generation if candidate.arch in rows]
            for generation in generations(problem, config, evaluator.evaluate, valued=valued)
        ]
        best_first = ranked([candidate for generation in (first, *later) for candidate in generation])
        if best_first:
            best = {"arch": str(best_first[0].arch), "limits": {"macs": str(limit)}}
            found[budget] = LatestSearch(best, best_first, first)
    return found
