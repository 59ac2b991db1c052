"""Running a prefix tree over a chunk of images within a memory budget.

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
from bsnas.kernels import graphs
from bsnas.kernels.inference import chosen_backend


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


class TreeRunner:
    """One pass of images through all nodes of a tree."""

    def __init__(self, tree: PrefixTree, layers: Layers, memory: Memory, dtype: torch.dtype) -> None:
        self.tree = tree
        self.layers = layers
        self.memory = memory
        self.itemsize = dtype.itemsize
        self._node_bytes = [
            max(step.dims.out_channels for step in set(level.steps)) * level.out_size**2 * self.itemsize
            for level in tree.levels
        ]
        """Per level, the largest output of a node for one image."""
        self._replays = graphs.Replays()

    @torch.inference_mode()
    def run(self, images: Tensor) -> Iterator[LeafScores]:
        """Images [n, 3, H, W], channels_last, normalised -> the logits of all leaves, in order, range by range.

        With CUDA graphs they are buffers that the next pass overwrites. Raises RuntimeError where graphs are switched
        on and cannot run.
        """
        graphs.check(images, chosen_backend(images))
        if graphs.enabled() and self._logits_fit(len(images)):
            start = 0
            for logits in self._replays(lambda x: [scores.logits for scores in self._launched(x)], images):
                yield LeafScores(range(start, start + len(logits)), logits)
                start += len(logits)
        else:
            yield from self._launched(images)

    def _logits_fit(self, images: int) -> bool:
        """Whether the logits of all leaves, which a replay leaves at once, fit in the workspace."""
        return len(self.tree.leaves) * images * self.tree.space.classes * self.itemsize <= self.memory.workspace

    def _launched(self, images: Tensor) -> Iterator[LeafScores]:
        x = self.layers.stem(images)
        roots = len(self.tree.levels[0])
        yield from self._descend(0, range(roots), [x], 0, self.memory.activations)

    def _descend(
        self, level: int, nodes: range, inputs: Sequence[Tensor], first_input: int, budget: int
    ) -> Iterator[LeafScores]:
        """Compute nodes of a level and everything below them; inputs[p - first_input] is the output of parent p."""
        first_child = self.tree.levels[level].first_child
        images = inputs[0].shape[0]
        start = nodes.start
        while start < nodes.stop:
            stop = min(nodes.stop, start + self._fitting(level, images, budget))
            outputs = self._compute(level, range(start, stop), inputs, first_input)
            if level + 1 == len(self.tree.levels):
                yield self._finish(range(start, stop), outputs)
            else:
                children = range(first_child[start], first_child[stop])
                held = (stop - start) * images * self._node_bytes[level]
                yield from self._descend(level + 1, children, outputs, start, budget - held)
            start = stop

    def _fitting(self, level: int, images: int, budget: int) -> int:
        """How many nodes of a level to hold at once: one node of each deeper level must still fit, and half of the
        rest is left to the deeper levels."""
        needed_below = images * sum(self._node_bytes[level + 1 :])
        return max(1, (budget - needed_below) // (2 * images * self._node_bytes[level]))

    def _compute(self, level: int, nodes: range, inputs: Sequence[Tensor], first_input: int) -> list[Tensor]:
        """The outputs [n, out, H, W] of consecutive nodes of a level, nodes of the same step in one batch."""
        table = self.tree.levels[level]
        outputs: list[Tensor] = [inputs[0]] * len(nodes)
        for step, members in table.groups(nodes.start, nodes.stop).items():
            pixels = table.in_size**2 + table.out_size**2
            per_image = (step.dims.hidden * pixels + step.dims.in_channels * table.in_size**2) * self.itemsize
            first = table.positions[members[0]]

            def run_step(batch: range, x: Tensor, step: Step = step, first: int = first) -> Tensor:
                return self.layers.block(level, step, range(first + batch.start, first + batch.stop), x)

            parts = [inputs[table.parents[node] - first_input] for node in members]
            computed = self._in_batches(run_step, parts, bytes_per_image=per_image)
            for node, y in zip(members, computed, strict=True):
                outputs[node - nodes.start] = y
        return outputs

    def _finish(self, leaves: range, outputs: Sequence[Tensor]) -> LeafScores:
        """The logits of consecutive leaves from the last block's outputs."""
        last = self.tree.levels[-1]
        logits: list[Tensor] = [outputs[0]] * len(leaves)
        by_width: dict[int, list[int]] = {}
        for leaf in leaves:
            by_width.setdefault(last.steps[leaf].dims.out_channels, []).append(leaf)
        for width, members in by_width.items():
            per_image = (width + self.tree.space.tail_channels) * last.out_size**2 * self.itemsize
            first = self.tree.tail_positions[members[0]]

            def run_tail(batch: range, x: Tensor, width: int = width, first: int = first) -> Tensor:
                return self.layers.tail(width, range(first + batch.start, first + batch.stop), x)

            parts = [outputs[leaf - leaves.start] for leaf in members]
            computed = self._in_batches(run_tail, parts, bytes_per_image=per_image)
            for leaf, y in zip(members, computed, strict=True):
                logits[leaf - leaves.start] = y
        return LeafScores(leaves, torch.stack(logits))

    def _in_batches(
        self, call: Callable[[range, Tensor], Tensor], parts: Sequence[Tensor], *, bytes_per_image: int
    ) -> list[Tensor]:
        """`call(positions in parts, their images in one batch)`, as few times as the workspace allows.

        Parts [n, ...] smaller than the workspace are joined, larger ones are cut unless they must stay whole. Returns
        the results [n, ...], part by part.
        """
        images = parts[0].shape[0]
        max_images = max(1, self.memory.workspace // bytes_per_image)
        per_call = max(1, max_images // images)
        results: list[Tensor] = []
        for first in range(0, len(parts), per_call):
            batch = range(first, min(first + per_call, len(parts)))
            x = parts[first] if len(batch) == 1 else torch.cat([parts[i] for i in batch])
            if images > max_images and not self.layers.whole_batches:
                y = torch.cat([call(batch, piece) for piece in x.tensor_split(-(-images // max_images))])
            else:
                y = call(batch, x)
            results += y.split(images)
        return results
