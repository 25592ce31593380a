"""Layouts and rules of a run: which communicators have several ranks, and what lies how on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.nn import Parameter

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.replicas import is_split
from lightning_dhellam.plan.layout import CHANNELS, COMMUNICATORS, Held, Kept, Layout, Move, Rule

ALIKE = Rule()
"""All that is read lies alike, and so does what is written."""

OF_TOKENS = Rule(mixes=CHANNELS)
"""As `ALIKE`, of what is computed of all channels of a token, such as a norm."""

DRAWS = ("batch.whole_key", "batch.places")
"""What dropout of hidden states reads: a key, and where in its sequence each token stands."""

DRAWS_OF_ALL = ("batch.whole_key", "batch.every_place")
"""As `DRAWS`, where a tensor-parallel rank has a part of every token instead of some tokens."""

DRAWN = Rule(draws="batch.whole_key", placed=frozenset({Held.SEQUENCE}))
"""As `ALIKE`, of that dropout: ranks that share a sequence draw what one rank would."""


def drawing(rule: Rule, reads: int, placed: frozenset[Held]) -> Rule:
    """`rule` of an operator that draws as well: behind its `reads` slots it has a key and places.

    What it draws follows from the places of what lies `placed`.
    """
    alike = Held.REPLICATED, Held.REPLICATED

    def with_both(move: Move) -> Move:
        each = move.reads if isinstance(move.reads, tuple) else (move.reads,) * reads
        return replace(move, reads=(*each, *alike))

    moves = {communicator: with_both(move) for communicator, move in rule.moves.items()}
    return replace(rule, moves=moves, draws=DRAWS[0], placed=placed)


def several(context: ParallelContext) -> frozenset[str]:
    """The communicators of more than one rank: on all others everything is replicated."""
    return frozenset(c for c in COMMUNICATORS if context.topology.sizes[c] > 1)


def _layout(context: ParallelContext, **held: Held) -> Layout:
    return Layout(**{c: held[c] for c in several(context) & held.keys()})


def of_stream(context: ParallelContext) -> Layout:
    """How hidden states lie between layers: split along the sequence, and by samples."""
    tokens, samples = Held.SEQUENCE, Held.SAMPLES
    return _layout(context, tp=tokens, cp=tokens, ep=samples, dp=samples)


def of_batch(context: ParallelContext) -> dict[str, Layout]:
    """How the slots of a micro-batch lie. Its numbers and the user's mapping lie nowhere.

    Tensor-parallel ranks have the same tokens, and draw from different keys what has no place in
    the sequence, since between the layers each has a part of them; `batch.whole_key` is for what
    they all compute of the whole, and for what has.
    """
    tokens = _layout(context, cp=Held.SEQUENCE, ep=Held.SAMPLES, dp=Held.SAMPLES)
    apart = dict.fromkeys(COMMUNICATORS, Held.DISTINCT)
    return {
        "batch.tokens": tokens,
        "batch.positions": tokens,
        "batch.places": of_stream(context),
        "batch.every_place": tokens,
        "batch.documents": tokens,
        "batch.labels": tokens,
        "batch.weights": tokens,
        "batch.padding": of_stream(context),
        "batch.key": _layout(context, **apart),
        "batch.whole_key": _layout(context, ep=Held.DISTINCT, dp=Held.DISTINCT),
    }


def bound(rule: Rule, context: ParallelContext, trained: Sequence[Parameter] = ()) -> Rule:
    """`rule` of an operator that adds to the gradients of `trained`, on what `context` has."""
    there = several(context)
    moves = {c: move for c, move in rule.moves.items() if c in there}
    kept = tuple(_kept(parameter, there) for parameter in trained)
    return replace(rule, moves=moves, kept=kept)


def _kept(parameter: Parameter, there: frozenset[str]) -> Kept:
    split = frozenset({"tp"} if is_split(parameter) else ())
    if is_expert(parameter):
        split |= {"ep"}
    return Kept(split & there, there - split)


def on_tp(
    reads: Held | tuple[Held, ...],
    writes: Held | tuple[Held, ...] = Held.REPLICATED,
    gradient: Held | tuple[Held, ...] | None = None,
) -> Rule:
    """A rule that names tensor parallelism alone."""
    return Rule({"tp": Move(reads, writes, gradient)})


def products(reads: Held, writes: Held) -> Rule:
    """The rule of a product by a weight: a partial sum where a rank has some of the channels."""
    summed = reads is not Held.REPLICATED
    rule = on_tp(reads, Held.PARTIAL if summed else writes)
    return replace(rule, mixes=CHANNELS)


def of_documents(held: Held, count: int, told: Sequence[str], *, cp: Move | None = None) -> Rule:
    """The rule of attention: `count` slots that lie on tensor-parallel ranks as `held`.

    Before them it reads what a micro-batch has `told`, the same on all these ranks: where documents
    lie, and the key by which weights are dropped if they are, by head and by places of tokens.
    """
    moves = {"tp": Move((*(Held.REPLICATED,) * len(told), *(held,) * count), held)}
    key = "batch.whole_key" if "batch.whole_key" in told else ""
    placed = frozenset({Held.SEQUENCE, Held.HEADS}) if key else frozenset()
    return Rule(
        moves | ({"cp": cp} if cp else {}), frozenset({Held.SEQUENCE}), draws=key, placed=placed
    )


def gathers(communicator: str, along: Held) -> Rule:
    """The rule of a gather: each rank has a shard along `along`, and all get the whole."""
    return Rule({communicator: Move(along, Held.REPLICATED)})


def scatters(communicator: str, along: Held) -> Rule:
    """The rule of a scatter: partial sums are added up, and each rank gets its shard of the sum."""
    return Rule({communicator: Move(Held.PARTIAL, along)})
