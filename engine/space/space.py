"""The search space as data: a table of clusters, and the operations still alive (paper, section 3.1 and Table 1).

Inside a cluster every block uses the cluster's channel number; every block chooses its own kernel, hidden width and
whatever else its row offers. Two widths belong to every architecture: the widths inside the *supernet*, where the last
block of a cluster (its spring block) puts out the cluster's largest option so that the next cluster can be built, and
the widths of the *released* network, where it puts out the selected channels.

This module needs no torch.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import Arch, BlockOp, Operation
from bsnas.engine.space.plan import Plan, size_after
from bsnas.engine.space.table import MOST, Cluster, Row, TableError, with_tuples

Sharing = Literal["nested", "channels", "independent"]
"""Who shares convolution weights inside a block.

- `nested`: all operations; kernels are centre crops of the largest, hidden widths and channels are slices.
- `channels`: the operations of equal choices of the block, as the choice blocks of SPOS and FairNAS.
- `independent`: nobody.
"""

Springs = Literal["fixed", "sliced"]
"""What the last block of a cluster puts out in the supernet.

- `fixed`: the largest channel option, where the cluster has several blocks (the paper's spring blocks).
- `sliced`: the selected channels; path and released network are then equal for every architecture.
"""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A search space: a table of clusters, what the network reads and tells, and the operations still alive."""

    table: tuple[Cluster, ...]
    """All clusters, from the images to the classifier."""
    springs: Springs = "fixed"
    resolution: int = 224
    """Input height and width in pixels."""
    input_channels: int = 3
    classes: int = 1000
    live: tuple[tuple[Operation, ...], ...] = ()
    """Per searched block, the operations that shrinking has left; all of them when not given."""

    def __post_init__(self) -> None:
        if not self.table:
            raise TableError("a space needs at least one cluster", "cluster")
        if self.springs not in get_args(Springs):
            raise TableError(f"springs {self.springs!r:.40} of a space; allowed are fixed and sliced", "springs")
        for name in ("resolution", "input_channels", "classes"):
            value, most = getattr(self, name), MOST.get(name, MOST["channels"])
            if type(value) is not int or not 1 <= value <= most:
                raise TableError(
                    f"{name} of a space is {value!r:.40}; it must be a positive integer of at most {most}", name
                )
        if sum(cluster.blocks for cluster in self.table) > MOST["blocks"]:
            rows = ((row.blocks, j, n) for j, cluster in enumerate(self.table) for n, row in enumerate(cluster.rows))
            _, cluster, row = max(rows)
            message = f"a space has at most {MOST['blocks']} blocks; give clusters with fewer"
            raise TableError(message, "blocks", cluster, row)
        if not self.live:
            object.__setattr__(self, "live", tuple(map(self._operations_of, range(self.num_blocks))))
        self._check_live()

    def check_strides(self) -> None:
        """Raise `TableError` where a stride has no pixels left to skip."""
        size = self.resolution
        for j, cluster in enumerate(self.table):
            for number, row in enumerate(cluster.rows):
                for key in ("stride",) * (row.stride > 1) + ("pool",) * row.pool:
                    if size == 1:
                        raise TableError(
                            f"{key} of a block that reads 1x1 pixels: {self.resolution} pixels are used up; "
                            "allowed is stride 1 without pool; take a stride out or raise resolution",
                            key, j, number,
                        )  # fmt: skip
                    size = size_after(size, 2)

    def _operations_of(self, block: int) -> tuple[Operation, ...]:
        return self.clusters[self.block_cluster[block]].operations(self.block_row(block))

    def _check_live(self) -> None:
        if len(self.live) != self.num_blocks:
            raise UserError(f"a space of {self.num_blocks} blocks got live operations for {len(self.live)}")
        for i, ops in enumerate(self.live):
            foreign = set(ops) - set(self._operations_of(i))
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
    def _searched(self) -> range:
        """The clusters that texts write: all but a stem and a tail without a choice."""
        written = [j for j, cluster in enumerate(self.table) if cluster.written] or range(len(self.table))
        return range(written[0], written[-1] + 1)

    @cached_property
    def stem(self) -> tuple[Cluster, ...]:
        """Leading clusters without a choice; an architecture's text leaves them out."""
        return self.table[: self._searched.start]

    @cached_property
    def clusters(self) -> tuple[Cluster, ...]:
        """The searched clusters: those that an architecture's text writes."""
        return self.table[self._searched.start : self._searched.stop]

    @cached_property
    def tail(self) -> tuple[Cluster, ...]:
        """Trailing clusters without a choice; an architecture's text leaves them out."""
        return self.table[self._searched.stop :]

    @cached_property
    def block_cluster(self) -> tuple[int, ...]:
        """The cluster index of every searched block."""
        return tuple(j for j, cluster in enumerate(self.clusters) for _ in range(cluster.blocks))

    @cached_property
    def cluster_blocks(self) -> tuple[range, ...]:
        """The block indices of every searched cluster."""
        ends = [sum(cluster.blocks for cluster in self.clusters[: j + 1]) for j in range(len(self.clusters))]
        return tuple(range(end - cluster.blocks, end) for end, cluster in zip(ends, self.clusters, strict=True))

    @cached_property
    def _places(self) -> tuple[tuple[Row, int], ...]:
        return tuple(place for cluster in self.clusters for place in cluster.places)

    @property
    def num_blocks(self) -> int:
        return len(self.block_cluster)

    def is_first(self, block: int) -> bool:
        """Whether the block is the first of its cluster."""
        return block == self.cluster_blocks[self.block_cluster[block]][0]

    def is_spring(self, block: int) -> bool:
        """Whether the block's supernet output is fixed: the last of a cluster of two blocks or more."""
        blocks = self.cluster_blocks[self.block_cluster[block]]
        return self.springs == "fixed" and len(blocks) > 1 and block == blocks[-1]

    def block_row(self, block: int) -> Row:
        return self._places[block][0]

    def block_stride(self, block: int) -> int:
        """By which height and width fall in the block, a max pool included."""
        row, stride = self._places[block]
        return stride * (2 if row.pool else 1)

    @cached_property
    def has_identities(self) -> bool:
        """Whether a block may be left out, so that different texts may mean one network."""
        return any(BlockOp() in row.choices for row, _ in self._places)

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
        """The choices of a block under a channel number of its cluster."""
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

    def with_clusters(self, clusters: Sequence[Cluster]) -> "Space":
        """Other searched clusters, all operations alive, between the same stem and tail."""
        return replace(self, table=(*self.stem, *clusters, *self.tail), live=())

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

    # ---- plans

    @cached_property
    def entry_channels(self) -> int:
        """What the first searched block reads."""
        return self.stem[-1].channels[0] if self.stem else self.input_channels

    @cached_property
    def stem_plans(self) -> tuple[Plan, ...]:
        return tuple(_fixed_plans(self.stem, self.input_channels))

    def tail_plans(self, inputs: int) -> tuple[Plan, ...]:
        """The fixed blocks behind the searched ones, which put out so many channels."""
        return tuple(_fixed_plans(self.tail, inputs))

    def classifier_inputs(self, inputs: int) -> int:
        """What the classifier reads where the last searched block puts out so many channels."""
        return self.tail[-1].channels[0] if self.tail else inputs

    @cached_property
    def _plans(self) -> dict[tuple[int, int, int, int, Operation], Plan]:
        return {}

    def _plan(self, block: int, inputs: int, base: int, outputs: int, operation: Operation) -> Plan:
        key = (block, inputs, base, outputs, operation)
        if key not in self._plans:
            row, stride = self._places[block]
            self._plans[key] = row.plan(operation.block_op, inputs, outputs, operation.channels, base, stride)
        return self._plans[key]

    def released_plan(self, block: int, before: int, operation: Operation) -> Plan:
        """A block of a released network that reads `before` channels."""
        return self._plan(block, before, before, operation.channels, operation)

    def released_plans(self, arch: Arch) -> tuple[Plan, ...]:
        """The blocks of the released network: an ordinary stack of the selected widths."""
        before = self.entry_channels
        plans: list[Plan] = []
        for i, op in enumerate(arch.operations):
            plans.append(self.released_plan(i, before, op))
            before = op.channels
        return tuple(plans)

    @cached_property
    def spring_widths(self) -> tuple[int, ...]:
        """Per searched block what it puts out in the supernet if that is fixed, else 0."""
        widest = [max(self.clusters[j].channels) for j in self.block_cluster]
        return tuple(widest[i] if self.is_spring(i) else 0 for i in range(self.num_blocks))

    def supernet_width(self, block: int, operation: Operation) -> int:
        """What a block puts out in the supernet: a spring block its cluster's largest option, else what is selected."""
        return self.spring_widths[block] or operation.channels

    def table_inputs(self, block: int, channels: int) -> tuple[int, ...]:
        """The widths that a searched block can read in the supernet while every operation is alive, ascending."""
        if self.is_first(block) and block and not self.spring_widths[block - 1]:
            return tuple(sorted(self.clusters[self.block_cluster[block - 1]].channels))
        return self.supernet_inputs(block, channels)

    def supernet_inputs(self, block: int, channels: int) -> tuple[int, ...]:
        """The widths that a searched block can read in the supernet under its cluster's channels, ascending."""
        if not self.is_first(block):
            return (channels,)
        return self._widths_behind(self.block_cluster[block] - 1) if block else (self.entry_channels,)

    @property
    def tail_inputs(self) -> tuple[int, ...]:
        """The widths that reach the tail in the supernet, ascending."""
        return self._widths_behind(len(self.clusters) - 1)

    def _widths_behind(self, cluster: int) -> tuple[int, ...]:
        """What a cluster can put out in the supernet."""
        fixed = self.spring_widths[self.cluster_blocks[cluster][-1]]
        return (fixed,) if fixed else self.live_channels(cluster)

    def expansion_base(self, block: int, inputs: int) -> int:
        """What an expansion ratio of the input multiplies in a block that reads `inputs` channels.

        Behind a cluster of one block fixed springs keep the hidden width of its largest option.
        """
        before = self.clusters[self.block_cluster[block - 1]] if block and self.is_first(block) else None
        one_block = before is not None and before.blocks == 1 and self.springs == "fixed"
        return max(before.channels) if before is not None and one_block else inputs

    def supernet_plan(self, block: int, inputs: int, operation: Operation) -> Plan:
        """The slice of a block that the supernet uses for an operation behind `inputs` channels."""
        base = self.expansion_base(block, inputs)
        return self._plan(block, inputs, base, self.supernet_width(block, operation), operation)

    def supernet_plans(self, arch: Arch) -> tuple[Plan, ...]:
        """The slice of every searched block that the supernet uses for an architecture.

        A cluster of one block puts out the selected channels, and the block that follows reads only these.
        """
        inputs = self.entry_channels
        plans: list[Plan] = []
        for i, op in enumerate(arch.operations):
            plans.append(self.supernet_plan(i, inputs, op))
            inputs = self.supernet_width(i, op)
        return tuple(plans)

    def input_sizes(self) -> list[int]:
        """Height of what every searched block reads in pixels, and behind them of what the tail reads."""
        size = self.resolution
        for plan in self.stem_plans:
            size = size_after(size, plan.stride)
        sizes = [size]
        for i in range(self.num_blocks):
            sizes.append(size_after(sizes[-1], self.block_stride(i)))
        return sizes

    # ---- files

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the table without the live operations: equal when weights of one fit the other."""
        return _digest({name: value for name, value in self._hashed.items() if name != "live"})

    @cached_property
    def live_fingerprint(self) -> str:
        """A hash of the table and the live operations."""
        return _digest(self._hashed)

    @property
    def _hashed(self) -> dict[str, Any]:
        """What is hashed: the form that files had before rows, where it can be, since they hold such hashes."""
        from bsnas.engine.space.mobile import mobile_form

        return mobile_form(self) or self.to_json()

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in ("springs", "resolution", "input_channels", "classes")}
        data["table"] = [asdict(cluster) for cluster in self.table]
        data["live"] = [[str(op) for op in ops] for ops in self.live]
        return json.loads(json.dumps(data))

    @classmethod
    def from_json(cls, data: Any) -> "Space":
        """The space that `to_json` wrote, also before there were rows. Raises `UserError` when the data is none."""
        from bsnas.engine.space.mobile import of_mobile_form

        try:
            given = dict(data)
            live = tuple(tuple(Operation.parse(op) for op in ops) for ops in given.pop("live"))
            if "table" not in given:
                return of_mobile_form(given, live)
            table = tuple(
                Cluster(channels=tuple(channels), rows=tuple(Row(**with_tuples(row)) for row in rows))
                for channels, rows in (_only(cluster, "channels", "rows") for cluster in given.pop("table"))
            )
            return cls(table=table, live=live, **given)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"this is not a search space: {error}; give a file that this program wrote") from None


def _fixed_plans(clusters: Sequence[Cluster], inputs: int) -> Iterator[Plan]:
    """The blocks of clusters without a choice, the first of which reads `inputs` channels."""
    for cluster in clusters:
        (channels,) = cluster.channels
        for row, stride in cluster.places:
            yield row.plan(row.choices[0], inputs, channels, channels, inputs, stride)
            inputs = channels


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _only(data: Any, *names: str) -> list[Any]:
    """The values of exactly these entries. Raises ValueError when there are others or one is missing."""
    if data.keys() != set(names):
        raise ValueError(f"an entry has {', '.join(data)} where {' and '.join(names)} belong")
    return [data[name] for name in names]
