"""Step-shrinking: which operations stay after a step (paper, section 3.2 and Algorithm 1). No torch.

Pure functions: scored architectures in, importance of every operation and a smaller space out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, Operation
from bsnas.engine.space.limited_sampling import check_limits
from bsnas.engine.space.limits import Limit
from bsnas.engine.space.problem import Problem
from bsnas.engine.space.space import Space

Importance = tuple[dict[Operation, float], ...]
"""Per block, R_i of every live operation."""


def importance(space: Space, archs: Sequence[Arch], top1: Sequence[float]) -> Importance:
    """R_i = (N_top - N_bottom) / N of every live operation of every block (paper, equation 1).

    N counts the architectures that use the operation, N_top and N_bottom those in the best and the worst third by
    top-1. Ties are broken by the order of `archs`, the earlier first. An operation that no architecture uses gets 0.
    """
    ranked = sorted(range(len(archs)), key=lambda i: -top1[i])
    third = len(archs) // 3
    result: list[dict[Operation, float]] = []
    operations = [archs[i].operations for i in ranked]
    for block, live in enumerate(space.live):
        total, balance = dict.fromkeys(live, 0), dict.fromkeys(live, 0)
        for rank, ops in enumerate(operations):
            total[ops[block]] += 1
            if rank < third:
                balance[ops[block]] += 1
            elif rank >= len(archs) - third:
                balance[ops[block]] -= 1
        result.append({op: balance[op] / total[op] if total[op] else 0.0 for op in live})
    return tuple(result)


def shrink(space: Space, ratios: Importance, keep: int) -> Space:
    """The space with at most `keep` operations per block.

    A block keeps its operations with the largest positive R_i, or the best one when none is positive. A cluster keeps
    the channel numbers that its last block keeps and that every other block has an operation for; when that leaves
    none, it keeps the number with the best mean R_i and every block gets its best operation with it. So the space is
    never empty, and every operation in it can be reached.
    """
    kept = [_best(block_ratios, keep) for block_ratios in ratios]
    live: list[Sequence[Operation]] = []
    for j, blocks in enumerate(space.cluster_blocks):
        spring_channels = {op.channels for op in kept[blocks[-1]]}
        surviving = {
            channels
            for channels in spring_channels
            if all(any(op.channels == channels for op in kept[i]) for i in blocks)
        }
        if not surviving:
            surviving = {_best_channels(ratios, blocks, space.live_channels(j))}
        for i in blocks:
            mine = [op for op in kept[i] if op.channels in surviving]
            missing = surviving - {op.channels for op in mine}
            mine += [_best({op: r for op, r in ratios[i].items() if op.channels == c}, 1)[0] for c in missing]
            live.append([op for op in space.live[i] if op in mine])
    return space.with_live(live)


def shrink_inside(space: Space, ratios: Importance, keep: int, limit: Limit, best: Arch) -> Space:
    """`shrink`, but a space that still has a network inside a limit.

    Where the step would leave none, the operations of `best` stay too, the best network inside the limit that was
    scored: one more than `keep` in a block at most.
    """
    after = shrink(space, ratios, keep)
    try:
        check_limits(Problem.of(after, (limit,)))
    except UserError:
        live = [
            [op for op in before if op in kept or op == own]
            for before, kept, own in zip(space.live, after.live, best.operations, strict=True)
        ]
        return space.with_live(live)
    return after


def _best(ratios: Mapping[Operation, float], keep: int) -> list[Operation]:
    """The `keep` operations with the largest positive ratio, or the single best one; the earlier of equals first."""
    ranked = sorted(ratios, key=lambda op: -ratios[op])
    return [op for op in ranked[:keep] if ratios[op] > 0] or ranked[:1]


def _best_channels(ratios: Importance, blocks: range, options: Sequence[int]) -> int:
    """The channel number whose operations have the best mean ratio over the blocks; the smaller one of equals."""

    def mean_ratio(channels: int) -> float:
        values = [ratio for i in blocks for op, ratio in ratios[i].items() if op.channels == channels]
        return sum(values) / len(values)

    return max(sorted(options), key=mean_ratio)


def importance_to_json(ratios: Importance) -> list[dict[str, Any]]:
    return [{str(op): ratio for op, ratio in block.items()} for block in ratios]
