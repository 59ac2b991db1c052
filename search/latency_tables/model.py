"""Latency of any released network of a space, from timed parts and a measured correction.

A model is a JSON file (search/latency.py writes it). It says what it was measured on, and is refused elsewhere. No
torch, so that a search can tell within seconds that a limit is out of reach.
"""

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bsnas.engine.host.atomic import write_atomically
from bsnas.engine.host.errors import UserError
from bsnas.engine.runs.rundir import RunDir
from bsnas.engine.space.cost import Cost
from bsnas.engine.space.space import Space
from bsnas.search.latency_tables.network_parts import Part, PartTable
from bsnas.search.latency_tables.timings import LatencyContext


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """What one part of a network adds."""

    ms: float
    """Corrected: what predictions sum up."""
    timed_ms: float
    spread_ms: float
    """Interquartile range of the timing."""
    visits: int


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Predicts latencies of one context: offset plus the costs of a network's parts."""

    context: LatencyContext
    space: str
    """Fingerprint of the table of clusters."""
    correction: str
    """Form of the correction (search/latency_tables/fit.py)."""
    offset_ms: float
    parts: Mapping[str, PartCost]
    errors: Mapping[str, float]
    """On architectures that nothing was fitted to: mape, max_error, kendall_tau, held_out."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was measured, for people."""

    def cost(self, space: Space) -> Cost:
        """Milliseconds of a batch. Raises `UserError` when the model is of other clusters or lacks a part."""
        if space.fingerprint != self.space:
            raise UserError(
                "the latency table was measured for other clusters or another resolution than this run's; "
                "measure again with search/latency.py"
            )
        table = PartTable(space)
        missing = [part for part in table.all_parts() if str(part) not in self.parts]
        if missing:
            raise UserError(
                f"the latency table lacks {len(missing)} parts of this space, as {missing[0]}; "
                "run search/latency.py again, it measures what is missing"
            )

        def ms(part: Part | None) -> float:
            return 0 if part is None else self.parts[str(part)].ms

        return Cost(
            space,
            operator.add,
            ms(table.stem),
            cache(lambda *place: ms(table.block(*place))),
            cache(lambda channels: ms(table.tail(channels))),
            constant=self.offset_ms,
        )

    def save(self, file: Path) -> None:
        write_atomically(file, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, file: Path) -> "LatencyModel":
        """Raises `UserError` when the file holds no model."""
        try:
            data = json.loads(file.read_text())
            parts = {name: PartCost(**cost) for name, cost in data.pop("parts").items()}
            if not all(cost.ms >= 0 for cost in parts.values()):
                raise ValueError("a cost is no number of at least 0")
            return cls(context=LatencyContext(**data.pop("context")), parts=parts, **data)
        except (OSError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise UserError(
                f"{file} holds no latency table ({error}); give a file that search/latency.py wrote"
            ) from None


def find_model(run: RunDir, table: Path | None, wanted: Mapping[str, str | int | None]) -> tuple[Path, LatencyModel]:
    """The model in `table`, or the only one of a run that fits.

    Args:
        run: where to look.
        table: a file, if the user gave one.
        wanted: `backend`, `batch` and `precision` as far as the user gave them.

    Raises `UserError` when there is none, more than one, or `table` is of something else than wanted.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    files = [table] if table is not None else run.latency_tables()
    models = {file: LatencyModel.load(file) for file in files}
    fitting = {file: model for file, model in models.items() if given.items() <= asdict(model.context).items()}
    asked = ", ".join(f"{name} {value}" for name, value in given.items())
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if table is not None:
        theirs = asdict(models[table].context)
        wrong = [f"{name} {theirs[name]}, not {value}" for name, value in given.items() if theirs[name] != value]
        raise UserError(
            f"latency table {table} is of {' and of '.join(wrong)}; give the table of what you ask for, or measure it "
            "with search/latency.py"
        )
    if not fitting:
        raise UserError(
            f"the run has no latency table{f' of {asked}' if asked else ''}; measure one with search/latency.py --run"
        )
    names = ", ".join(file.name for file in fitting)
    raise UserError(f"the run has several latency tables ({names}); choose one with --latency-table FILE")


def refuse_other_device(model: LatencyModel, device: str, versions: str, file: Path) -> None:
    """Raise `UserError`, naming what differs, unless the model was measured on this device with these versions."""
    both = {"device": (model.context.device, device), "versions": (model.context.versions, versions)}
    wrong = [f"{name} {theirs} and not {here}" for name, (theirs, here) in both.items() if theirs != here]
    if wrong:
        raise UserError(
            f"latency table {file} was measured on another machine than this: {', '.join(wrong)}; measure here with "
            "search/latency.py, or search for that other one with --foreign-table"
        )
