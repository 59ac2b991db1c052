"""Limits on what networks may cost, how they are written, and whether any network can keep them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bsnas.engine.host.errors import UserError

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Limit:
    """The interval, ends included, that one cost of the released network must lie in."""

    cost: str
    """Name of the cost, as `macs`."""
    low: float = 0
    high: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise UserError(
                f"{self.cost} from {self._text(self.low)} to {self._text(self.high)} is empty; "
                "the lower limit must not exceed the upper one"
            )

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        if self.low == 0:
            return f"{self.cost} <= {self._text(self.high)}"
        if self.high == math.inf:
            return f"{self.cost} >= {self._text(self.low)}"
        return f"{self._text(self.low)} <= {self.cost} <= {self._text(self.high)}"

    def _text(self, value: float) -> str:
        return format_cost(self.cost, value)


Ranges = Mapping[str, tuple[float, float]]
"""Per cost the smallest and the largest value that can be had."""


def check_reachable(limits: Sequence[Limit], ranges: Ranges) -> None:
    """Raise `UserError` for a limit that no network of the ranges keeps, whatever it does to the others."""
    for limit in limits:
        low, high = ranges[limit.cost]
        if limit.low > high or limit.high < low:
            raise unreachable(limits, ranges, "in this space")


def unreachable(limits: Sequence[Limit], reachable: Ranges, where: str) -> UserError:
    """The error for limits that no architecture keeps; `where` is what `reachable` holds under, as `in this space`."""
    limited = {limit.cost for limit in limits}
    ranges = ", ".join(
        f"{cost} {format_cost(cost, low, math.ceil)} to {format_cost(cost, high, math.floor)}"
        for cost, (low, high) in reachable.items()
        if cost in limited
    )
    return UserError(
        f"no architecture has {' and '.join(map(str, limits))}; reachable {where}: {ranges}; "
        "set the limits inside what is reachable"
    )


def parse_count(text: str) -> int:
    """`465M`, `0.4G`, `4500k` or a plain integer as a number. Raises `UserError` for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([KMG]?)", text.strip().upper(), re.ASCII)
    value = round(float(match[1]) * _SUFFIXES[match[2]]) if match else 0
    if value < 1:
        raise UserError(f"{text[:40]!r} is not a count; write a positive number as 465M, 0.4G, 4500K or 465000000")
    return value


def format_cost(cost: str, value: float, rounding: Callable[[float], int] = round) -> str:
    """A cost as its limit is written: milliseconds to four digits, everything else a count."""
    if cost != "latency_ms" or not math.isfinite(value) or value <= 0:
        return format_count(value, rounding)
    unit = 10.0 ** (3 - math.floor(math.log10(value)))
    return f"{rounding(value * unit) / unit:.10g}"


def format_count(value: float, rounding: Callable[[float], int] = round) -> str:
    """A count in a form that `parse_count` reads, as `465M`: up to five significant digits, rounded as told."""
    if not math.isfinite(value):
        return "any"
    suffix = next((s for s in ("G", "M", "K") if value >= _SUFFIXES[s]), "")
    unit = _SUFFIXES[suffix]
    decimals = max(0, 4 - int(math.log10(value / unit))) if suffix else 0
    rounded = rounding(value / unit * 10**decimals) / 10**decimals
    return f"{rounded:.{decimals}f}".rstrip("0").rstrip(".") + suffix if decimals else f"{rounded:.0f}{suffix}"
