"""Architectures as data and as text: the choice of every block, and the channel number of every cluster. No torch."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bsnas.engine.host.errors import UserError
from bsnas.engine.space.plan import Activation

LETTERS: dict[Activation, str] = {"relu": "r", "relu6": "m"}
"""Of an activation in an operation's text."""
ACTIVATIONS: dict[str, Activation] = {letter: name for name, letter in LETTERS.items()}

IDENTITY = "i"
_BLOCK_OP = r"i|k[1-9]\d?(?:t[1-9]\d?|w[1-9]\d{0,4})?[rm]?"


class BlockOp(NamedTuple):
    """The part of an operation that a block chooses for itself; `k5t3`, `k3w96r` or `i` (identity) as text."""

    kernel: int = 0
    """0 for the identity only."""
    expansion: int = 0
    """0 where the hidden width is absolute or the family has none."""
    width: int = 0
    """The absolute hidden width, or 0."""
    activation: str = ""
    """Its letter where the row has several."""

    def __str__(self) -> str:
        if not self.kernel:
            return IDENTITY
        expansion = f"t{self.expansion}" if self.expansion else ""
        width = f"w{self.width}" if self.width else ""
        return f"k{self.kernel}{expansion}{width}{self.activation}"

    @classmethod
    def parse(cls, text: str) -> "BlockOp":
        """The choice that `str` wrote. Raises ValueError when the text is none."""
        match = re.fullmatch(r"i|k([1-9]\d?)(?:t([1-9]\d?)|w([1-9]\d{0,4}))?([rm]?)", text, re.ASCII)
        if match is None:
            raise ValueError(f"{text!r:.40} is no choice of a block")
        kernel, expansion, width, activation = match.groups()
        return cls(int(kernel or 0), int(expansion or 0), int(width or 0), activation or "")


class Operation(NamedTuple):
    """One choice of one block with its cluster's channels; `k5t3c40` as text."""

    block_op: BlockOp
    channels: int

    def __str__(self) -> str:
        return f"{self.block_op}c{self.channels}"

    @classmethod
    def parse(cls, text: str) -> "Operation":
        """The operation that `str` wrote. Raises `UserError` when the text is none."""
        match = re.fullmatch(rf"({_BLOCK_OP})c(\d{{1,5}})", text, re.ASCII)
        if match is None:
            raise UserError(f"operation {text!r:.40} does not parse; write kKERNELtEXPANSIONcCHANNELS, as k5t3c40")
        return cls(BlockOp.parse(match[1]), int(match[2]))


@dataclass(frozen=True)
class Arch:
    """An architecture: one channel number per cluster and one choice per block.

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
            match = re.fullmatch(rf"c(\d{{1,5}}):((?:{_BLOCK_OP})(?:,(?:{_BLOCK_OP}))*)", part, re.ASCII)
            if match is None:
                raise UserError(
                    f"architecture {text[:80]!r} does not parse at {part[:40]!r}; "
                    "write each cluster as cCHANNELS:kKERNELtEXPANSION,... and join clusters with _ "
                    "(example: c24:k3t3,k5t6_c48:k7t6)"
                )
            channels.append(int(match[1]))
            blocks.append(tuple(map(BlockOp.parse, match[2].split(","))))
        return cls(tuple(channels), tuple(blocks))

    @cached_property
    def flat_blocks(self) -> tuple[BlockOp, ...]:
        """The choices of all blocks in network order."""
        return tuple(op for ops in self.blocks for op in ops)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        """The operation of every block in network order."""
        return tuple(
            Operation(op, channels) for channels, ops in zip(self.channels, self.blocks, strict=True) for op in ops
        )
