"""How slots lie on the communicators, and the rules of operators.

A slot is on every rank of a communicator the same, or a partial sum, or a shard along some
dimension. Each operator carries a rule: what it needs of the slots that it reads, and how the slots
lie that it writes. Of a column-parallel and a row-parallel linear layer with what is around them:

    qkv.gather    tp sharded(sequence) -> replicated
    qkv.gemm      tp replicated        -> sharded(heads)
    proj.gemm     tp sharded(heads)    -> partial
    proj.scatter  tp partial           -> sharded(sequence)

Where a rule names no communicator, its operator leaves things as they are: a GEMM that
tensor-parallel ranks share does not mind that data-parallel ranks have other samples. On a
communicator of one rank everything is replicated, and no rule names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum


class Held(StrEnum):
    """What a rank of a communicator has of a slot.

    `PARTS` is for parameters of a user's own whose dimensions nobody has named, and `DISTINCT` for
    random keys alone: each rank has another.
    """

    REPLICATED = "replicated"
    PARTIAL = "partial"
    SAMPLES = "sharded(samples)"
    SEQUENCE = "sharded(sequence)"
    HEADS = "sharded(heads)"
    FFN = "sharded(ffn)"
    VOCABULARY = "sharded(vocabulary)"
    EXPERTS = "sharded(experts)"
    PARTS = "sharded(parts)"
    DISTINCT = "distinct"


TOKENS = frozenset({Held.SAMPLES, Held.SEQUENCE})
"""Shards of the tokens: what a rank sums over its own is a partial sum."""

CHANNELS = frozenset({Held.HEADS, Held.FFN, Held.VOCABULARY})
"""Shards of what one token consists of."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a slot lies on each communicator. Prints as `tp sharded(sequence), dp partial`."""

    tp: Held = Held.REPLICATED
    cp: Held = Held.REPLICATED
    ep: Held = Held.REPLICATED
    dp: Held = Held.REPLICATED

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout that prints as `text`.

        Raises:
            ValueError: `text` names an unknown communicator, or an unknown way to lie on it.
        """
        held: dict[str, Held] = {}
        for part in () if text == Held.REPLICATED else text.split(", "):
            match = re.fullmatch(r"(\w+) (\S+)", part)
            if match is None or match[1] not in COMMUNICATORS or match[1] in held:
                raise ValueError(
                    f"{text!r} is no layout: write one such as 'tp sharded(sequence), dp partial'"
                )
            held[match[1]] = Held(match[2])
        return cls(**held)

    def on(self, communicator: str) -> Held:
        """What a rank of `communicator` has."""
        held: Held = getattr(self, communicator)
        return held

    def __str__(self) -> str:
        held = ((name, self.on(name)) for name in COMMUNICATORS)
        parts = [f"{name} {how}" for name, how in held if how is not Held.REPLICATED]
        return ", ".join(parts) or str(Held.REPLICATED)


COMMUNICATORS = tuple(f.name for f in fields(Layout))
"""Names of the lanes on which slots lie in some way."""


@dataclass(frozen=True, slots=True)
class Move:
    """What an operator does on one communicator.

    Attributes:
        reads: how the slots that it reads must lie: one for all, or one for each in their order.
        writes: how the slots lie that it writes, likewise.
        gradient: how the gradients lie that it adds to, where `reads` do not say it: one for all,
            or one for each.
    """

    reads: Held | tuple[Held, ...]
    writes: Held | tuple[Held, ...] = Held.REPLICATED
    gradient: Held | tuple[Held, ...] | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """How a parameter lies, and what completes its gradient after the last operator.

    Attributes:
        sharded: communicators whose ranks have different parts of it.
        summed: communicators over which its gradient is added up later.
    """

    sharded: frozenset[str] = frozenset()
    summed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """What an operator needs of how slots lie, and how what it writes lies then.

    On a communicator that `moves` does not name, all that it reads must lie alike and be no
    partial sum, and what it writes lies so too.

    Attributes:
        moves: by communicator.
        mixes: dimensions along which it makes one value out of several: it needs the whole.
        sums: slots it writes that are sums over tokens: partial sums where a rank has only some.
        draws: the key it reads, if it draws random numbers. Ranks with different parts of the rest
            need different keys, and ranks with the same need the same.
        placed: shards whose places in the whole are known, and what it draws follows from them:
            then ranks with different such shards need the same key.
        kept: the parameters whose gradients it adds to.
    """

    moves: Mapping[str, Move] = field(default_factory=dict)
    mixes: frozenset[Held] = frozenset()
    sums: tuple[str, ...] = ()
    draws: str = ""
    placed: frozenset[Held] = frozenset()
    kept: tuple[Kept, ...] = ()
