"""What released networks cost: MACs, parameters and peak activation memory by counting, latency by a measured table."""

from bsnas.engine.space.cost import CostModel
from bsnas.engine.space.space import Arch, BlockDims, BlockOp, Space
from bsnas.search.costs.chain import ChainCost, links
from bsnas.search.costs.constraints import Constraints, Cost, Limit

OBJECTIVES = {"macs": "macs", "params": "params", "memory": "activation_bytes", "latency": "latency_ms"}
"""Costs that a search can minimise, and the names they are stored under."""

_BYTES = 4


class PeakActivation:
    """Most bytes of activations that a released network holds at once for one image, in fp32.

    While a layer runs, its input and its output are there, and inside a block with a shortcut the block's input too.
    The peak is a maximum over blocks and no sum, so a limit on it rules out operations one by one.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._sizes = [-(-space.resolution // space.stem_stride)]
        for i in range(space.num_blocks):
            self._sizes.append(-(-self._sizes[-1] // space.block_stride(i)))
        pixels, stem = self._sizes[0] ** 2, space.stem_channels
        images = space.resolution**2 * space.input_channels
        self.stem = _BYTES * max(images + pixels * stem, 2 * pixels * stem, pixels * (stem + space.separable_channels))

    def __call__(self, arch: Arch) -> int:
        dims = self.space.released_dims(arch)
        return max(self.stem, *map(self._dims, range(len(dims)), dims), self.tail(dims[-1].out_channels))

    def block(self, index: int, before: int | None, channels: int, op: BlockOp) -> int:
        """Peak inside one block after a cluster of `before` channels (None: the stem)."""
        inputs = self.space.separable_channels if before is None else before
        stride = self.space.block_stride(index)
        return self._dims(index, BlockDims(inputs, op.expansion * inputs, channels, op.kernel, stride))

    def tail(self, channels: int) -> int:
        """Peak behind a last cluster of so many channels."""
        return _BYTES * self._sizes[-1] ** 2 * (channels + self.space.tail_channels)

    def _dims(self, index: int, dims: BlockDims) -> int:
        before, after = self._sizes[index] ** 2, self._sizes[index + 1] ** 2
        kept = before * dims.in_channels if dims.residual else 0
        expand = before * (dims.in_channels + dims.hidden)
        depthwise = kept + (before + after) * dims.hidden
        project = kept + after * (dims.hidden + dims.out_channels)
        return _BYTES * max(expand, depthwise, project)

    def range(self) -> tuple[int, int]:
        """The smallest and largest peak of a live architecture."""
        return self._extreme(smallest=True), self._extreme(smallest=False)

    def _extreme(self, *, smallest: bool) -> int:
        pick = min if smallest else max
        best: dict[int | None, int] = {None: self.stem}
        for i in range(self.space.num_blocks):
            reached: dict[int | None, list[int]] = {}
            for before, channels in links(self.space, i):
                own = pick(self.block(i, before, channels, op) for op in self.space.live_block_ops(i, channels))
                reached.setdefault(channels, []).append(max(best[before], own))
            best = {channels: pick(values) for channels, values in reached.items()}
        return pick(max(value, self.tail(c)) for c, value in best.items() if c is not None)


def constraints_for(space: Space, limits: tuple[Limit, ...], latency: Cost | None = None) -> Constraints:
    """Limits with every cost that can be told; all of them are recorded with candidates, limited or not."""
    model, peak = CostModel(space), PeakActivation(space)
    costs: dict[str, Cost] = {"macs": model.macs, "params": model.params, "activation_bytes": peak}
    if latency is not None:
        costs["latency_ms"] = latency
    return Constraints(limits, costs, peaks={"activation_bytes": peak})


def cost_names(objectives: tuple[str, ...]) -> tuple[str, ...]:
    """Stored names of the objectives that are costs."""
    return tuple(OBJECTIVES[name] for name in objectives if name != "top1")


def cost_ranges(space: Space, constraints: Constraints, costs: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """The smallest and largest value of costs in a space."""
    return {
        cost: constraints.peaks[cost].range()
        if cost in constraints.peaks
        else ChainCost(space, constraints.costs[cost]).range()
        for cost in costs
    }
