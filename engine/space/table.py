"""What a space is made of: clusters that share a channel number, and rows of equal blocks inside them. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.arch import ACTIVATIONS, LETTERS, BlockOp, Operation
from bsnas.engine.space.families import FAMILIES
from bsnas.engine.space.families.family import Block, Family, identity
from bsnas.engine.space.plan import Activation, Plan

MOST = {
    "blocks": 1000, "kernels": 99, "expansions": 99, "widths": 99_999, "channels": 99_999, "resolution": 10_000
}  # fmt: skip
"""Largest values of a table: what an architecture's text can say, and far beyond any network."""
MOST_OPERATIONS = 10_000
"""Of one block."""


class TableError(UserError):
    """A table of clusters that no network can be built of. `key` and, where known, cluster and row say where."""

    def __init__(self, message: str, key: str, cluster: int | None = None, row: int | None = None) -> None:
        super().__init__(message)
        self.key, self.cluster, self.row = key, cluster, row


def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and value >= 1  # True is no width, although it is an int


def _check_options(name: str, options: Any, *, needed: bool) -> None:
    whole = isinstance(options, tuple) and all(map(_is_positive_integer, options))
    if not whole or (needed and not options) or len(set(options)) != len(options):
        raise TableError(f"{name} {options!r:.80} of a cluster: give one or more different positive integers", name)
    if options and max(options) > MOST[name]:
        raise TableError(f"{name} {options!r:.80} of a cluster: allowed are at most {MOST[name]}", name)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Blocks of a cluster that offer the same choices."""

    family: str = "ir"
    """Kind of block (engine/space/families/)."""
    blocks: int = 1
    stride: int = 1
    """Of the first block; the others have stride 1."""
    kernels: tuple[int, ...] = (3,)
    """Kernel sizes to choose from, odd."""
    expansions: tuple[int, ...] = ()
    """Expansion ratios to choose from."""
    widths: tuple[int, ...] = ()
    """Absolute hidden widths to choose from, instead of expansion ratios."""
    activations: tuple[Activation, ...] = ("relu6",)
    """Activations to choose from."""
    operations: tuple[str, ...] = ()
    """The choices themselves, as `k3t3`, `k5t6` and `i`, where they are no product of options."""
    identity: bool = False
    """Whether a block may also be left out."""
    expand: bool = True
    """Whether `ir` has an expansion convolution."""
    shortcut: Literal["projection", "none"] = "projection"
    """ResNet's shortcut where sizes change."""
    pool: bool = False
    """Whether a 3x3 max pool of stride 2 follows each block of `conv`."""

    def __post_init__(self) -> None:
        if not isinstance(self.family, str) or self.family not in FAMILIES:
            raise TableError(f"family {self.family!r:.40} is unknown; allowed are {', '.join(FAMILIES)}", "family")
        if not _is_positive_integer(self.blocks):
            raise TableError(f"a cluster has {self.blocks!r:.40} blocks; at least 1 is needed", "blocks")
        if not _is_positive_integer(self.stride) or self.stride > 2:
            raise TableError(f"a cluster has stride {self.stride!r:.40}; allowed are 1 and 2", "stride")
        _check_options("kernels", self.kernels, needed=True)
        _check_options("expansions", self.expansions, needed=False)
        _check_options("widths", self.widths, needed=False)
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise TableError(f"kernels {self.kernels} of a cluster: kernel sizes must be odd", "kernels")
        self._check_activations()
        self._check_settings()
        self._check_hidden()
        self._check_operations()

    def _check_activations(self) -> None:
        given = self.activations
        known = isinstance(given, tuple) and bool(given) and all(a in get_args(Activation) for a in given)
        if not known or len(set(given)) != len(given):
            raise TableError(
                f"activations {given!r:.80} of a cluster: give one or more different of "
                f"{', '.join(get_args(Activation))}",
                "activations",
            )

    def _check_settings(self) -> None:
        """That switches are true or false, and only set where the family has them."""
        for key in ("identity", "expand", "pool"):
            if type(getattr(self, key)) is not bool:
                raise TableError(f"{key} is {getattr(self, key)!r:.40}; allowed are true and false", key)
        if self.shortcut not in ("projection", "none"):
            raise TableError(f"shortcut is {self.shortcut!r:.40}; allowed are projection and none", "shortcut")
        changed = {"expand": not self.expand, "shortcut": self.shortcut == "none", "pool": self.pool}
        for key, is_set in changed.items():
            if is_set and key not in self._family.settings:
                having = [family.name for family in FAMILIES.values() if key in family.settings]
                raise TableError(
                    f"{key} belongs to {', '.join(having)}, not to family {self.family}; take the line out", key
                )
        if self.pool and self.identity:
            raise TableError("a row with a max pool has no identity; take one of both out", "identity")

    def _check_hidden(self) -> None:
        """That hidden widths are given exactly where blocks have them."""
        has_hidden = self._has_hidden
        for key in ("expansions", "widths"):
            if getattr(self, key) and not has_hidden:
                kind = f"family {self.family}" if self.expand else "a row without expansion"
                raise TableError(f"{kind} has no hidden width to choose; take {key} out", key)
        if self.expansions and self.widths:
            raise TableError("a row has expansions or widths, not both; take one of both out", "widths")
        if has_hidden and not self.expansions and not self.widths and not self.operations:
            raise TableError(f"family {self.family} needs expansions or widths; give one or more", "expansions")

    def _check_operations(self) -> None:
        """That listed choices stand for themselves and are such as the row could have."""
        given = self.operations
        if not isinstance(given, tuple) or not all(isinstance(text, str) for text in given):
            raise TableError(f"operations {given!r:.80} of a row: give texts, as k3t3, k5t6 and i", "operations")
        if not given:
            return
        for key in ("kernels", "expansions", "widths", "identity"):
            if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                raise TableError(f"a row has operations or {key}, not both; take one of both out", key)
        if len(set(given)) != len(given):
            raise TableError(
                f"operations {given!r:.80} of a row: each may stand there once; take one out", "operations"
            )
        for text in given:
            if not self._could_be(text):
                hidden = "tEXPANSION or wWIDTH" if self._has_hidden else "nothing"
                raise TableError(
                    f"operation {text!r:.40} is none of family {self.family}; allowed are i, and kKERNEL with an odd "
                    f"kernel and {hidden} behind it",
                    "operations",
                )  # fmt: skip

    def _could_be(self, text: str) -> bool:
        try:
            op = BlockOp.parse(text)
        except ValueError:
            return False
        if not op.kernel:
            return text == str(op) and not self.pool
        several = len(self.activations) > 1
        fits = bool(op.expansion or op.width) == self._has_hidden and bool(op.activation) == several
        known = not several or ACTIVATIONS[op.activation] in self.activations
        return fits and known and op.kernel % 2 == 1 and text == str(op)

    @property
    def _has_hidden(self) -> bool:
        """Whether its blocks choose a hidden width."""
        return self._family.hidden and self.expand

    @property
    def _family(self) -> Family:
        return FAMILIES[self.family]

    @cached_property
    def choices(self) -> tuple[BlockOp, ...]:
        """What each block of the row chooses from, in the order of the options; the identity last."""
        if self.operations:
            return tuple(map(BlockOp.parse, self.operations))
        letters = [LETTERS[a] for a in self.activations] if len(self.activations) > 1 else [""]
        hidden = [(t, 0) for t in self.expansions] or [(0, w) for w in self.widths] or [(0, 0)]
        found = [BlockOp(k, t, w, letter) for k in self.kernels for t, w in hidden for letter in letters]
        return (*found, BlockOp()) if self.identity else tuple(found)

    def plan(self, op: BlockOp, inputs: int, outputs: int, channels: int, base: int, stride: int) -> Plan:
        """The plan of a block of these sizes (engine/space/families/family.py says what each is)."""
        activation = ACTIVATIONS[op.activation] if op.activation else self.activations[0]
        block = Block(
            inputs, outputs, channels, base, stride, op.kernel, op.expansion, op.width, activation, self.expand,
            self.shortcut == "projection", self.pool,
        )  # fmt: skip
        return self._family.plan(block) if op.kernel else identity(block)


def with_tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a file, whose lists of options become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Blocks that share one channel number (one line of Table 1)."""

    channels: tuple[int, ...]
    """Output channels to choose from, shared by the blocks of the cluster."""
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        _check_options("channels", self.channels, needed=True)
        if not self.rows:
            raise TableError("a cluster has no blocks; give at least one row", "channels")
        for number, row in enumerate(self.rows):
            if len(row.choices) * len(self.channels) > MOST_OPERATIONS:
                raise TableError(
                    f"a cluster has more than {MOST_OPERATIONS} operations; give fewer options", "kernels", row=number
                )

    @property
    def blocks(self) -> int:
        return sum(row.blocks for row in self.rows)

    @cached_property
    def places(self) -> tuple[tuple[Row, int], ...]:
        """Row and stride of every block."""
        return tuple((row, row.stride if n == 0 else 1) for row in self.rows for n in range(row.blocks))

    def operations(self, row: Row) -> tuple[Operation, ...]:
        """What a block of a row can be, the channel numbers one after another."""
        return tuple(Operation(op, channels) for channels in self.channels for op in row.choices)

    @property
    def written(self) -> bool:
        """Whether it has a place in texts wherever it stands: something is chosen, or a family says so."""
        single = len(self.channels) == 1 and all(len(row.choices) == 1 for row in self.rows)
        return not (single and all(FAMILIES[row.family].fixed_text for row in self.rows))
