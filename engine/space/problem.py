"""What a search is asked: a space, limits on what its networks may cost, and the costs to minimise beside accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass

from bsnas.engine.space.arch import Arch
from bsnas.engine.space.cost import Cost, CostModel
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.space import Space

OBJECTIVES = {"macs": "macs", "params": "params", "memory": "activation_bytes", "latency": "latency_ms"}
"""Costs that a search can minimise, and the names they are stored under."""


@dataclass(frozen=True)
class Problem:
    """The best networks of a space are wanted, inside limits; with costs to minimise, the Pareto set of them."""

    space: Space
    """Only live operations are used."""
    limits: tuple[Limit, ...]
    """All of them must be kept."""
    costs: Mapping[str, Cost]
    """Every cost that is recorded with candidates, limited or not; at least those that are limited or minimised."""
    minimised: tuple[str, ...] = ()
    """Names of costs; none of them is the paper's search for the best top-1 alone."""

    @classmethod
    def of(
        cls,
        space: Space,
        limits: tuple[Limit, ...] = (),
        *,
        objectives: tuple[str, ...] = ("top1",),
        latency: Cost | None = None,
    ) -> "Problem":
        """With every cost that can be told. `objectives` are top1 and names of `OBJECTIVES`."""
        counted = CostModel(space)
        costs = {"macs": counted.macs, "params": counted.params, "activation_bytes": counted.activation_bytes}
        if latency is not None:
            costs["latency_ms"] = latency
        return cls(space, limits, costs, tuple(OBJECTIVES[name] for name in objectives if name != "top1"))

    def allows(self, arch: Arch) -> bool:
        return all(limit.allows(self.costs[limit.cost](arch)) for limit in self.limits)

    def costs_of(self, arch: Arch) -> dict[str, float]:
        return {name: cost(arch) for name, cost in self.costs.items()}
