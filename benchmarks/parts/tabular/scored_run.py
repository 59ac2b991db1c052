"""A run's one-shot scores of a table's networks, and what a search by them finds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bsnas.benchmarks.parts.tabular.public_table import PublicTable, Row
from bsnas.benchmarks.parts.tabular.ranking import BUDGETS, Half, in_half
from bsnas.engine.evaluation.evaluator import BatchNormMode, Score
from bsnas.engine.evaluation.trained_run import TrainedRun
from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.search.algorithms.evolution import EvolutionConfig, ranked
from bsnas.search.runs.search import generations


@dataclass(frozen=True)
class ScoredRun:
    """Scores of the different networks of a table, in one half or in both."""

    trained: TrainedRun
    bn: BatchNormMode | None
    table: PublicTable
    half: Half | None

    def check(self) -> None:
        """Raise `UserError` where the run is not of the table's space, or the table has no accuracies."""
        given, wanted = self.trained.supernet.space, self.table.space
        if replace(given, classes=wanted.classes, springs=wanted.springs) != wanted:
            raise UserError(
                f"{self.trained.run.path} has another space than {self.table.name}, or was shrunk; train one with "
                f"engine/train.py --space {self.table.name} --shrink.keep"
            )
        if any(
            not row.accuracies or len(row.accuracies) != len(self.table.rows[0].accuracies) for row in self.table.rows
        ):
            raise UserError(
                f"the table of {self.table.name} has networks without accuracies, so nothing to rank by; give one "
                "whose entries have test_acc or acc, or --check-costs alone"
            )

    def rows(self) -> dict[Arch, Row]:
        """The networks that are ranked."""
        return {arch: row for arch, row in self.table.distinct().items() if in_half(row, self.half)}

    def scores(self, archs: list[Arch]) -> list[Score]:
        return self.trained.evaluator(self.bn).evaluate(archs)

    def found(self, rows: Mapping[Arch, Row], config: EvolutionConfig) -> dict[int, Row]:
        """By budget, the first of `rows` in the paper's search, which looks at the whole space.

        A budget is left out where the search met none of them.
        """
        evaluator, found = self.trained.evaluator(self.bn), {}
        for budget in BUDGETS:
            problem = Problem.of(self.trained.supernet.space, (Limit("macs", high=budget * 1e6),))
            seen = [c for generation in generations(problem, config, evaluator.evaluate) for c in generation]
            best = next((c for c in ranked(seen) if c.arch in rows), None)
            if best is not None:
                found[budget] = rows[best.arch]
        return found
