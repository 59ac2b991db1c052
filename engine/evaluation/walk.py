"""Walking a prefix tree with a chunk of images, within a memory budget.

Nodes are computed level by level. When the outputs of a level would not fit, the level is cut into ranges of nodes, and
each range's whole subtree runs before the next range: depth first between ranges, level by level inside one. No node
is computed twice for a chunk, whatever the budget.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bsnas.engine.evaluation.memory import Memory
from bsnas.engine.evaluation.tree import PrefixTree, Step
from bsnas.engine.space.plan import layer_sizes
from bsnas.kernels import choose_backend, graphs


class Layers(Protocol):
    """What the nodes compute. `nodes` are positions among the nodes of the same step on the same level, `leaves` among
    the leaves of the same width."""

    whole_batches: bool
    """Whether a node's images must be computed in one piece, because they are normalised together."""

    def stem(self, images: Tensor) -> Tensor:
        """Images [n, 3, H, W] -> the input of the first block."""
        ...

    def block(self, level: int, step: Step, nodes: range, x: Tensor) -> Tensor:
        """One step for a batch of nodes: x [nodes * n, in, H, W] -> [nodes * n, out, H', W']."""
        ...

    def tail(self, width: int, leaves: range, x: Tensor) -> Tensor:
        """The leaves' outputs x [leaves * n, width, H, W] -> logits [leaves * n, classes]."""
        ...


class LeafScores(NamedTuple):
    """Logits [leaves, n, classes] of consecutive leaves."""

    leaves: range
    logits: Tensor


class Walker:
    """Walks of one tree. With CUDA graphs, what a walk launches is captured once for each size of chunk."""

    def __init__(self, tree: PrefixTree, layers: Layers) -> None:
        self.tree = tree
        self.layers = layers
        self._captured_with: Memory | None = None
        self._replays = graphs.Replays()

    @torch.inference_mode()
    def walk(self, images: Tensor, memory: Memory) -> Iterator[LeafScores]:
        """Images [n, 3, H, W], channels_last, normalised -> the logits of all leaves, in order, range by range.

        With CUDA graphs they are buffers that the next walk overwrites. Raises RuntimeError where graphs are switched
        on and cannot run.
        """
        choose_backend(images, work="score")
        if not graphs.enabled() or not self._logits_fit(images, memory):
            yield from walk(self.tree, self.layers, images, memory)
            return
        if memory != self._captured_with:
            self._captured_with, self._replays = memory, graphs.Replays()
        start = 0
        for logits in self._replays(lambda x: [s.logits for s in walk(self.tree, self.layers, x, memory)], images):
            yield LeafScores(range(start, start + len(logits)), logits)
            start += len(logits)

    def _logits_fit(self, images: Tensor, memory: Memory) -> bool:
        """Whether the logits of all leaves, which a replay leaves at once, fit in the workspace."""
        return len(self.tree.leaves) * len(images) * self.tree.space.classes * images.itemsize <= memory.workspace


class _Pending(NamedTuple):
    """Nodes of a level that are still to be computed, with everything below them."""

    level: int
    nodes: range
    inputs: Sequence[Tensor]
    """inputs[p - first_input] is the output of parent p."""
    first_input: int
    budget: int
    """Bytes for outputs of these nodes and of those below."""


def walk(tree: PrefixTree, layers: Layers, images: Tensor, memory: Memory) -> Iterator[LeafScores]:
    """The logits of all leaves for images [n, 3, H, W], range by range."""
    image_bytes = [level.widest * level.out_size**2 * images.itemsize for level in tree.levels]
    """Per level, the largest output of a node for one image."""
    pending = [_Pending(0, range(len(tree.levels[0])), [layers.stem(images)], 0, memory.activations)]
    while pending:
        level, nodes, inputs, first_input, budget = pending.pop()
        # As many nodes at once as leave room for one of each deeper level and half of the rest to the deeper levels.
        below = len(images) * sum(image_bytes[level + 1 :])
        fitting = max(1, (budget - below) // (2 * len(images) * image_bytes[level]))
        now, later = nodes[:fitting], nodes[fitting:]
        outputs = _compute(tree, layers, level, now, inputs, first_input, memory)
        if later:
            pending.append(_Pending(level, later, inputs, first_input, budget))
        if level + 1 == len(tree.levels):
            yield _finish(tree, layers, now, outputs, memory)
        else:
            first_child = tree.levels[level].first_child
            children = range(first_child[now.start], first_child[now.stop])
            held = len(now) * len(images) * image_bytes[level]
            pending.append(_Pending(level + 1, children, outputs, now.start, budget - held))


def _compute(
    tree: PrefixTree,
    layers: Layers,
    level: int,
    nodes: range,
    inputs: Sequence[Tensor],
    first_input: int,
    memory: Memory,
) -> list[Tensor]:
    """The outputs [n, out, H, W] of consecutive nodes of a level, nodes of the same step in one batch."""
    table = tree.levels[level]
    outputs: list[Tensor] = [inputs[0]] * len(nodes)
    for step, members in table.groups(nodes.start, nodes.stop).items():
        per_image = _workspace(step, table.in_size) * inputs[0].itemsize
        first = table.positions[members[0]]

        def run_step(batch: range, x: Tensor, step: Step = step, first: int = first) -> Tensor:
            return layers.block(level, step, range(first + batch.start, first + batch.stop), x)

        parts = [inputs[table.parents[node] - first_input] for node in members]
        computed = _in_batches(run_step, parts, memory.workspace // per_image, whole=layers.whole_batches)
        for node, y in zip(members, computed, strict=True):
            outputs[node - nodes.start] = y
    return outputs


def _workspace(step: Step, size: int) -> int:
    """Values of one image that a step reads and keeps inside: its input, and what all but its last layer put out."""
    sizes = layer_sizes(step.plan, size)
    inner = [*sizes[: len(step.plan.layers) - 1], *sizes[len(step.plan.layers) :]]
    return step.inputs * size**2 + sum(layer.outputs * written**2 for layer, _, written in inner)


def _finish(tree: PrefixTree, layers: Layers, leaves: range, outputs: Sequence[Tensor], memory: Memory) -> LeafScores:
    """The logits of consecutive leaves from the last block's outputs."""
    last = tree.levels[-1]
    logits: list[Tensor] = [outputs[0]] * len(leaves)
    by_width: dict[int, list[int]] = {}
    for leaf in leaves:
        by_width.setdefault(last.steps[leaf].outputs, []).append(leaf)
    for width, members in by_width.items():
        convs = [layer for plan in tree.space.tail_plans(width) for layer in plan.convs]
        widths = width + sum(layer.outputs for layer in convs)
        per_image = widths * last.out_size**2 * outputs[0].itemsize
        first = tree.tail_positions[members[0]]

        def run_tail(batch: range, x: Tensor, width: int = width, first: int = first) -> Tensor:
            return layers.tail(width, range(first + batch.start, first + batch.stop), x)

        parts = [outputs[leaf - leaves.start] for leaf in members]
        computed = _in_batches(run_tail, parts, memory.workspace // per_image, whole=layers.whole_batches)
        for leaf, y in zip(members, computed, strict=True):
            logits[leaf - leaves.start] = y
    return LeafScores(leaves, torch.stack(logits))


def _in_batches(
    call: Callable[[range, Tensor], Tensor], parts: Sequence[Tensor], most_images: int, *, whole: bool
) -> list[Tensor]:
    """`call(positions in parts, their images in one batch)`, as few times as batches of `most_images` allow.

    Parts [n, ...] that are smaller are joined, larger ones are cut unless they must stay whole. Returns the results
    [n, ...], part by part.
    """
    images, most_images = len(parts[0]), max(1, most_images)
    per_call = max(1, most_images // images)
    results: list[Tensor] = []
    for first in range(0, len(parts), per_call):
        batch = range(first, min(first + per_call, len(parts)))
        x = parts[first] if len(batch) == 1 else torch.cat([parts[i] for i in batch])
        if images > most_images and not whole:
            y = torch.cat([call(batch, piece) for piece in x.tensor_split(-(-images // most_images))])
        else:
            y = call(batch, x)
        results += y.split(images)
    return results
