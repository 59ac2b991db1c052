"""What a search writes into its run directory, and how it goes on from there.

search/NAME.json    all generations of one search, what it was asked for, and what its scores depend on
search/best.json    the best architecture inside the limits of the latest search: what retraining takes; and those that
                    follow it, for the finals
search/pareto.json  the accuracy-MACs front
The last two are over every search whose scores are comparable, since one supernet serves many budgets.

NAME.json is replaced as a whole after each generation, so a killed search loses at most the one that was running, and
that one's evaluations are in the evaluator's store.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bsnas.engine.host.distributed import Process, on_main
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir, read_json, write_json
from bsnas.engine.space.arch import Arch
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.space import Space
from bsnas.search.algorithms.evolution import Candidate, EvolutionConfig, Generation

MOST_RANKED = 32
"""Candidates in best.json: as many as can enter finals."""


@dataclass(frozen=True)
class History:
    """The stored generations of one search: same request and same scores, same file.

    The main process reads and writes, and every process gets what it read.
    """

    process: Process
    run: RunDir
    request: dict[str, Any]
    """Limits, settings of the evolution, and objectives and latency table where there are any, as JSON data."""
    scored_by: dict[str, str]
    """What the scores depend on: weights, images, space, batch normalisation."""
    space: Space

    @classmethod
    def of(
        cls,
        process: Process,
        run: RunDir,
        problem: Problem,
        config: EvolutionConfig,
        scored_by: dict[str, str],
        more: dict[str, Any],
    ) -> "History":
        """`more` is what the request says beside limits and evolution."""
        live = problem.space.live_fingerprint
        limits = {limit.cost: str(limit) for limit in problem.limits}
        request = {"limits": limits, "evolution": asdict(config), **more}
        return cls(process, run, request, {**scored_by, "space": live}, problem.space)

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps([self.request, self.scored_by], sort_keys=True).encode()).hexdigest()
        limits = re.findall(r"\w[\w.]*", " ".join(self.request["limits"].values()))
        label = "-".join(
            [*self.request.get("objectives", ()), *limits, f"seed{self.request['evolution']['seed']}", digest[:8]]
        )
        return self.run.search / f"{label}.json"

    def load(self) -> list[Generation]:
        """The generations stored so far. Raises `UserError` for a damaged file."""

        def read() -> list[Generation]:
            return _generations(read_json(self.file), self.file, self.space) if self.file.is_file() else []

        return on_main(self.process, read)

    def comparable(self) -> list[Candidate]:
        """All candidates of the run's other searches whose scores come from the same weights and images."""

        def read() -> list[Candidate]:
            found: list[Candidate] = []
            for file in self.run.search_files():
                if file == self.file:
                    continue
                state = read_json(file)
                if isinstance(state, dict) and state.get("scored_by") == self.scored_by:
                    found += [candidate for rows in _generations(state, file, self.space) for candidate in rows]
            return found

        return on_main(self.process, read)

    def save(self, generations: Sequence[Generation]) -> None:
        """Store all generations so far."""
        rows = [[_to_json(candidate) for candidate in generation] for generation in generations]
        state = {"request": self.request, "scored_by": self.scored_by, "generations": rows}
        on_main(self.process, lambda: write_json(self.file, state))

    def publish(self, best: Candidate, front: Sequence[Candidate], ranked: Sequence[Candidate]) -> None:
        """Write best.json, with the first of the ranking for the finals, and pareto.json."""

        def write() -> None:
            first = [best, *(candidate for candidate in ranked if candidate.arch != best.arch)][:MOST_RANKED]
            about = {"limits": self.request["limits"], "search": self.file.name}
            write_json(self.run.best_file, {**_to_json(best), **about, "ranked": [_to_json(c) for c in first]})
            write_json(self.run.front_file, [_to_json(candidate) for candidate in front])

        on_main(self.process, write)


@dataclass(frozen=True)
class LatestSearch:
    """What the latest search of a run left: what it found, and what it began with."""

    best: dict[str, Any]
    """What best.json holds, the ranking left out."""
    ranked: list[Candidate]
    """The best ones inside the limits, the best first."""
    first: list[Candidate]
    """Its first, random generation."""

    @classmethod
    def of(cls, run: RunDir, space: Space) -> "LatestSearch":
        """Raises `UserError` when there is none, or a file of it is damaged."""
        if not run.best_file.is_file():
            raise UserError(f"{run.path} holds no search result; run search/evolve.py --run {run.path} first")
        best = read_json(run.best_file)
        try:
            file, rows = run.search / best.pop("search"), best.pop("ranked")
            ranked = [_candidate(dict(row), space) for row in rows]
            if file not in run.search_files() or best["arch"] != str(ranked[0].arch):
                raise ValueError("its search is gone")
        except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise UserError(
                f"{run.best_file} tells of no search of this version ({error!s:.60}); repeat search/evolve.py, which "
                "takes its evaluations from the run"
            ) from None
        return cls(best, ranked, _generations(read_json(file), file, space)[0])


def _to_json(candidate: Candidate) -> dict[str, Any]:
    scores: dict[str, Any] = {"top1": candidate.top1, "top5": candidate.top5, "loss": candidate.loss}
    if not candidate.complete:
        scores["complete"] = False
    if candidate.value is not None:
        scores["value"] = candidate.value
    return {"arch": str(candidate.arch), **candidate.costs, **scores}


def _generations(state: Any, file: Path, space: Space) -> list[Generation]:
    try:
        return [[_candidate(dict(row), space) for row in generation] for generation in state["generations"]]
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} holds no search of this program ({error}); remove it, the evaluations themselves are kept"
        ) from None


def _candidate(row: dict[str, Any], space: Space) -> Candidate:
    """Raises one of several errors when the row is none of a candidate in the space."""
    arch = Arch.parse(row.pop("arch"))
    space.check(arch)
    complete, value = row.pop("complete", True), row.pop("value", None)
    if type(complete) is not bool or any(type(number) not in (int, float) for number in (value or 0, *row.values())):
        raise TypeError(f"{arch} has a value that is no number")
    top1, top5, loss = (row.pop(name) for name in ("top1", "top5", "loss"))
    if not 0 <= top1 <= top5 <= 1 or any(cost < 0 for cost in row.values()):
        raise ValueError(f"{arch} has a top-1, top-5 or cost that is impossible")
    return Candidate(arch, row, top1, top5, loss, complete, value)
