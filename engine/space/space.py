"""The search space as data: clusters, operations, architectures (paper, section 3.1 and Table 1).

A space is a table of clusters. Inside a cluster every block uses the cluster's channel number; every block chooses
its own kernel and expansion ratio. Two widths belong to every architecture: the widths inside the *supernet*, where
the last block of a cluster (its spring block) always puts out the cluster's largest option so that the next cluster
can be built, and the widths of the *released* network, where it puts out the selected channels.

This module needs no torch.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from bsnas.engine.host.errors import UserError

Sharing = Literal["nested", "channels", "independent"]
"""Who shares convolution weights inside a block.

- `nested`: all operations; kernels are centre crops of the largest, expansions and channels are slices.
- `channels`: the operations of one (kernel, expansion), as the choice blocks of SPOS and FairNAS.
- `independent`: nobody.
"""


class BlockOp(NamedTuple):
    """The part of an operation that a block chooses for itself; `k5t3` as text."""

    kernel: int
    expansion: int

    def __str__(self) -> str:
        return f"k{self.kernel}t{self.expansion}"


class Operation(NamedTuple):
    """One choice of one block; `k5t3c40` as text."""

    kernel: int
    expansion: int
    channels: int

    @property
    def block_op(self) -> BlockOp:
        return BlockOp(self.kernel, self.expansion)

    def __str__(self) -> str:
        return f"{self.block_op}c{self.channels}"

    @classmethod
    def parse(cls, text: str) -> "Operation":
        """The operation that `str` wrote. Raises `UserError` when the text is none."""
        match = re.fullmatch(r"k(\d+)t(\d+)c(\d+)", text, re.ASCII)
        if match is None:
            raise UserError(f"operation {text!r:.40} does not parse; write kKERNELtEXPANSIONcCHANNELS, as k5t3c40")
        return cls(*map(int, match.groups()))


class BlockDims(NamedTuple):
    """The sizes of one inverted residual block."""

    in_channels: int
    hidden: int
    out_channels: int
    kernel: int
    stride: int

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels


MOST = {"blocks": 1000, "kernels": 99, "expansions": 99, "channels": 99_999, "resolution": 10_000}
"""Largest values of a table: what an architecture's text can say, and far beyond any network."""
MOST_OPERATIONS = 10_000
"""Of one block."""


def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and value >= 1  # True is no width, although it is an int


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Blocks that share one searched channel number (one line of Table 1)."""

    blocks: int
    """Number of inverted residual blocks."""
    kernels: tuple[int, ...]
    """Depthwise kernel sizes to choose from, odd."""
    expansions: tuple[int, ...]
    """Expansion ratios to choose from."""
    channels: tuple[int, ...]
    """Output channels to choose from, shared by the blocks of the cluster."""
    stride: int
    """Stride of the first block; the others have stride 1."""

    def __post_init__(self) -> None:
        if not _is_positive_integer(self.blocks):
            raise UserError(f"a cluster has {self.blocks!r:.40} blocks; at least 1 is needed")
        if not _is_positive_integer(self.stride) or self.stride > 2:
            raise UserError(f"a cluster has stride {self.stride!r:.40}; allowed are 1 and 2")
        for name in ("kernels", "expansions", "channels"):
            options = getattr(self, name)
            whole = isinstance(options, tuple) and all(map(_is_positive_integer, options))
            if not whole or not options or len(set(options)) != len(options):
                raise UserError(f"{name} {options!r:.80} of a cluster: give one or more different positive integers")
            if max(options) > MOST[name]:
                raise UserError(f"{name} {options!r:.80} of a cluster: allowed are at most {MOST[name]}")
        if len(self.kernels) * len(self.expansions) * len(self.channels) > MOST_OPERATIONS:
            raise UserError(f"a cluster has more than {MOST_OPERATIONS} operations; give fewer options")
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise UserError(f"kernels {self.kernels} of a cluster: kernel sizes must be odd")

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(
            Operation(kernel, expansion, channels)
            for channels in self.channels
            for kernel in self.kernels
            for expansion in self.expansions
        )


@dataclass(frozen=True)
class Arch:
    """An architecture: one channel number per cluster and one (kernel, expansion) per block.

    As text, a cluster is its channels and its blocks, clusters joined by `_`: `c24:k3t3,k5t6_c48:k7t6`.
    """

    channels: tuple[int, ...]
    blocks: tuple[tuple[BlockOp, ...], ...]
    """Per cluster, the choice of each of its blocks."""

    def __str__(self) -> str:
        return "_".join(
            f"c{channels}:{','.join(map(str, ops))}" for channels, ops in zip(self.channels, self.blocks, strict=True)
        )

    @classmethod
    def parse(cls, text: str) -> "Arch":
        """The architecture that `str` wrote. Raises `UserError` when the text is none."""
        channels, blocks = [], []
        for part in text.strip().split("_"):
            match = re.fullmatch(r"c(\d{1,5}):(k\d{1,2}t\d{1,2}(?:,k\d{1,2}t\d{1,2})*)", part, re.ASCII)
            if match is None:
                raise UserError(
                    f"architecture {text[:80]!r} does not parse at {part[:40]!r}; "
                    "write each cluster as cCHANNELS:kKERNELtEXPANSION,... and join clusters with _ "
                    "(example: c24:k3t3,k5t6_c48:k7t6)"
                )
            channels.append(int(match[1]))
            blocks.append(tuple(BlockOp(*map(int, op[1:].split("t"))) for op in match[2].split(",")))
        return cls(tuple(channels), tuple(blocks))

    @cached_property
    def flat_blocks(self) -> tuple[BlockOp, ...]:
        """The choices of all blocks in network order."""
        return tuple(op for ops in self.blocks for op in ops)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """The operation of every block in network order."""
        return tuple(
            Operation(*op, channels) for channels, ops in zip(self.channels, self.blocks, strict=True) for op in ops
        )


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search space: the fixed stem and tail, the clusters, and the operations still alive."""

    clusters: tuple[Cluster, ...]
    resolution: int = 224
    """Input height and width in pixels."""
    input_channels: int = 3
    classes: int = 1000
    stem_channels: int = 32
    """Output of the stem's 3x3 convolution."""
    stem_stride: int = 2
    separable_channels: int = 16
    """Output of the stem's 3x3 depthwise-separable convolution."""
    tail_channels: int = 1280
    """Output of the last 1x1 convolution, before the average pool."""
    live: tuple[tuple[Operation, ...], ...] = ()
    """Per block, the operations that shrinking has left; all of them when not given."""

    def __post_init__(self) -> None:
        if not self.clusters:
            raise UserError("a space needs at least one cluster")
        if not _is_positive_integer(self.stem_stride) or self.stem_stride > 2:
            raise UserError(f"stem stride {self.stem_stride}; allowed are 1 and 2")
        for name in (
            "resolution", "input_channels", "classes", "stem_channels", "separable_channels", "tail_channels"
        ):  # fmt: skip
            value, most = getattr(self, name), MOST.get(name, MOST["channels"])
            if not _is_positive_integer(value) or value > most:
                raise UserError(f"{name} of a space is {value!r:.40}; it must be a positive integer of at most {most}")
        if sum(cluster.blocks for cluster in self.clusters) > MOST["blocks"]:
            raise UserError(f"a space has at most {MOST['blocks']} blocks; give clusters with fewer")
        if not self.live:
            object.__setattr__(self, "live", tuple(self.clusters[j].operations for j in self.block_cluster))
        self._check_live()

    def _check_live(self) -> None:
        if len(self.live) != self.num_blocks:
            raise UserError(f"a space of {self.num_blocks} blocks got live operations for {len(self.live)}")
        for i, ops in enumerate(self.live):
            cluster = self.clusters[self.block_cluster[i]]
            foreign = set(ops) - set(cluster.operations)
            if foreign or not ops or len(set(ops)) != len(ops):
                raise UserError(
                    f"live operations of block {i + 1} must be different ones of its cluster, and at least one; "
                    f"got {', '.join(map(str, ops)) or 'none'}"
                )
        for j, blocks in enumerate(self.cluster_blocks):
            options = {frozenset(op.channels for op in self.live[i]) for i in blocks}
            if len(options) != 1:
                raise UserError(f"the blocks of cluster {j + 1} keep different channel numbers; they must agree")

    # ---- the shape of the table

    @cached_property
    def block_cluster(self) -> tuple[int, ...]:
        """The cluster index of every block."""
        return tuple(j for j, cluster in enumerate(self.clusters) for _ in range(cluster.blocks))

    @cached_property
    def cluster_blocks(self) -> tuple[range, ...]:
        """The block indices of every cluster."""
        ends = [sum(cluster.blocks for cluster in self.clusters[: j + 1]) for j in range(len(self.clusters))]
        return tuple(range(end - cluster.blocks, end) for end, cluster in zip(ends, self.clusters, strict=True))

    @property
    def num_blocks(self) -> int:
        return len(self.block_cluster)

    def is_first(self, block: int) -> bool:
        """Whether the block is the first of its cluster."""
        return block == self.cluster_blocks[self.block_cluster[block]][0]

    def is_spring(self, block: int) -> bool:
        """Whether the block's supernet output is fixed: the last of a cluster of two blocks or more."""
        blocks = self.cluster_blocks[self.block_cluster[block]]
        return len(blocks) > 1 and block == blocks[-1]

    def block_stride(self, block: int) -> int:
        return self.clusters[self.block_cluster[block]].stride if self.is_first(block) else 1

    # ---- live operations

    @cached_property
    def _live_block_ops(self) -> tuple[dict[int, tuple[BlockOp, ...]], ...]:
        tables: list[dict[int, tuple[BlockOp, ...]]] = []
        for ops in self.live:
            table: dict[int, tuple[BlockOp, ...]] = {}
            for op in ops:
                table[op.channels] = (*table.get(op.channels, ()), op.block_op)
            tables.append(table)
        return tuple(tables)

    @cached_property
    def _live_channels(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sorted(self._live_block_ops[blocks[0]])) for blocks in self.cluster_blocks)

    def live_channels(self, cluster: int) -> tuple[int, ...]:
        """The channel numbers that a cluster can still take, ascending."""
        return self._live_channels[cluster]

    def live_block_ops(self, block: int, channels: int) -> tuple[BlockOp, ...]:
        """The (kernel, expansion) choices of a block under a channel number of its cluster."""
        return self._live_block_ops[block][channels]

    @cached_property
    def max_live(self) -> int:
        """The largest number of live operations of a block: the number of paths of a round."""
        return max(len(ops) for ops in self.live)

    @cached_property
    def num_architectures(self) -> int:
        return math.prod(
            sum(math.prod(len(self.live_block_ops(i, channels)) for i in blocks) for channels in self.live_channels(j))
            for j, blocks in enumerate(self.cluster_blocks)
        )

    def with_live(self, live: Sequence[Sequence[Operation]]) -> "Space":
        """The same table with fewer live operations. Raises `UserError` when one is not of the table."""
        return replace(self, live=tuple(tuple(ops) for ops in live))

    def full(self) -> "Space":
        """The same table with every operation alive."""
        return replace(self, live=())

    def check(self, arch: Arch) -> None:
        """Raise `UserError` unless the architecture is one of this space."""
        shape = tuple(len(ops) for ops in arch.blocks)
        expected = tuple(cluster.blocks for cluster in self.clusters)
        if shape != expected:
            raise UserError(
                f"architecture {arch} has clusters of {shape} blocks; this space has {expected}; "
                "take an architecture of this space"
            )
        for j, (channels, blocks) in enumerate(zip(arch.channels, self.cluster_blocks, strict=True)):
            if channels not in self.live_channels(j):
                raise UserError(
                    f"cluster {j + 1} of architecture {arch} has {channels} channels; "
                    f"allowed are {', '.join(map(str, self.live_channels(j)))}"
                )
            for i in blocks:
                allowed = self.live_block_ops(i, channels)
                if arch.flat_blocks[i] not in allowed:
                    raise UserError(
                        f"block {i + 1} of architecture {arch} is {arch.flat_blocks[i]}; "
                        f"with {channels} channels allowed are {', '.join(map(str, allowed))}"
                    )

    # ---- widths

    def supernet_dims(self, arch: Arch) -> tuple[BlockDims, ...]:
        """The slice of every block that the supernet uses for an architecture.

        A spring block puts out its cluster's largest option. A cluster of one block puts out the selected channels
        and the block that follows reads only these, keeping the hidden width of the largest option.
        """
        dims: list[BlockDims] = []
        in_channels = hidden_base = self.separable_channels
        for i, op in enumerate(arch.operations):
            cluster = self.clusters[self.block_cluster[i]]
            out_channels = max(cluster.channels) if self.is_spring(i) else op.channels
            dims.append(
                BlockDims(in_channels, op.expansion * hidden_base, out_channels, op.kernel, self.block_stride(i))
            )
            in_channels = out_channels
            hidden_base = max(cluster.channels) if cluster.blocks == 1 else out_channels
        return tuple(dims)

    def released_dims(self, arch: Arch) -> tuple[BlockDims, ...]:
        """The blocks of the released network: an ordinary MobileNetV2-style stack of the selected widths."""
        dims: list[BlockDims] = []
        in_channels = self.separable_channels
        for i, op in enumerate(arch.operations):
            dims.append(
                BlockDims(in_channels, op.expansion * in_channels, op.channels, op.kernel, self.block_stride(i))
            )
            in_channels = op.channels
        return tuple(dims)

    # ---- files

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the table without the live operations: equal when weights of one fit the other."""
        table = self.to_json()
        del table["live"]
        return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        table = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("clusters", "live")}
        table["clusters"] = [
            {name: getattr(cluster, name) for name in cluster.__dataclass_fields__} for cluster in self.clusters
        ]
        table["live"] = [[str(op) for op in ops] for ops in self.live]
        return json.loads(json.dumps(table))

    @classmethod
    def from_json(cls, table: Any) -> "Space":
        """The space that `to_json` wrote. Raises `UserError` when the data is none."""
        try:
            fields = dict(table)
            clusters = tuple(Cluster(**_with_tuples(cluster)) for cluster in fields.pop("clusters"))
            live = tuple(tuple(Operation.parse(op) for op in ops) for ops in fields.pop("live"))
            return cls(clusters=clusters, live=live, **fields)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"this is not a search space: {error}; give a file that this program wrote") from None


def _with_tuples(fields: Any) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
