"""How one parameter of a rank is made of whole tensors, and they of all ranks' parts of it.

Rows of the table in `layout` are made of the few kinds here. Everything works on named tensors, so
that gradients convert like weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dhellam.models.config import ModelConfig

Shape = tuple[int, ...]


class Whole(Protocol):
    """A whole tensor, of which parts can be had: in memory, or in a file that is read when asked.

    Only ``whole[slices]`` reads anything, and no more than it says.
    """

    def __getitem__(self, slices: Any, /) -> Tensor:
        """A part, by a slice for each dimension up to the last that is cut."""


@dataclass(frozen=True)
class Parts:
    """Parts of a shard side by side, which nobody has put together yet.

    Attributes:
        tensors: the parts; they may have more dimensions than the shard, and are laid as it is.
        dim: along which they lie.
    """

    tensors: Sequence[Tensor]
    dim: int = 0

    def whole(self) -> Tensor:
        """The shard, put together."""
        return torch.cat(list(self.tensors), self.dim).flatten(0, self.dim)

    def write(self, target: Tensor) -> None:
        """Copy each to its place in the shard."""
        sizes = [tensor.shape[self.dim] for tensor in self.tensors]
        shape = [*self.tensors[0].shape]
        shape[self.dim] = sum(sizes)
        places = target.view(shape).split(sizes, self.dim)
        for place, tensor in zip(places, self.tensors, strict=True):
            place.copy_(tensor)


@dataclass(frozen=True)
class Conversion:
    """How one of our parameters is made of Hugging Face tensors.

    ``join`` finds the shard of a rank in the whole tensors (rank, size), of which it takes no more
    than the rank has; ``split`` finds the whole tensors in the shards of all ranks, in rank order:
    tensor-parallel ranks, or those that share an expert. What they give may be parts of what they
    were given.

    Attributes:
        ours: name of the parameter; of an expert, on the ranks that have it.
        theirs: the tensors and their shapes.
        layer: that the parameter is part of; None for the embedding and the head.
        expert: that the parameter is part of, by its number in the layer; None for all others.
    """

    ours: str
    theirs: dict[str, Shape]
    join: Callable[[Sequence[Whole], int, int], Tensor | Parts]
    split: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    layer: int | None = None
    expert: int | None = None

    def shard(self, whole: Sequence[Whole], rank: int, size: int) -> Tensor:
        """What `join` finds, as one tensor."""
        found = self.join(whole, rank, size)
        return found.whole() if isinstance(found, Parts) else found

    def write(self, target: Tensor, whole: Sequence[Whole], rank: int, size: int) -> None:
        """Fill the shard of a rank, of whose size no second one is made."""
        found = self.join(whole, rank, size)
        if isinstance(found, Parts):
            found.write(target)
        else:
            target.copy_(found)


def _part(rows: int, rank: int, size: int) -> slice:
    """The share of a rank, of rows or columns of which all have equally many."""
    assert rows % size == 0, "refused when the model is made"
    return slice(rank * rows // size, (rank + 1) * rows // size)


def _all(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The shards of all ranks side by side; one alone is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def norm(config: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Conversion]:
    """The parameters of a norm: a weight and, of a LayerNorm, a bias."""
    for part in ("weight",) if config.normalization == "RMSNorm" else ("weight", "bias"):
        yield replicated(f"{ours}.{part}", f"{theirs}.{part}", (width,))


def replicated(ours: str, theirs: str, shape: Shape) -> Conversion:
    """A tensor of which all ranks have the whole."""
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][:],
        split=lambda shards: [shards[0]],
    )


def rows(ours: str, theirs: str, shape: Shape) -> Conversion:
    """A tensor of which each rank has some rows."""
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][_part(shape[0], rank, size)],
        split=lambda shards: [_all(shards)],
    )


def columns(ours: str, theirs: str, shape: Shape) -> Conversion:
    """A matrix of which each rank has some columns."""
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][:, _part(shape[1], rank, size)],
        split=lambda shards: [_all(shards, 1)],
    )


def vocabulary(ours: str, theirs: str, shape: Shape, padded_rows: int) -> Conversion:
    """A table with a row for each token, of which each rank has some, padded with zeros."""
    count, *rest = shape

    def join(whole: Sequence[Whole], rank: int, size: int) -> Tensor | Parts:
        part = _part(padded_rows, rank, size)
        own = whole[0][min(part.start, count) : min(part.stop, count)]
        padding = part.stop - part.start - len(own)
        return Parts([own, own.new_zeros(padding, *rest)]) if padding else own

    return Conversion(ours, {theirs: shape}, join=join, split=lambda shards: [_all(shards)[:count]])


def gate_and_up(ours: str, theirs: tuple[str, str], shape: Shape) -> Conversion:
    """The input of a gated MLP: of each rank rows of the gate, then of the up projection."""

    def join(whole: Sequence[Whole], rank: int, size: int) -> Parts:
        return Parts([tensor[_part(shape[0], rank, size)] for tensor in whole])

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_all([half[part] for half in halves]) for part in range(2)]

    return Conversion(ours, dict.fromkeys(theirs, shape), join, split)


def attention_input(config: ModelConfig, ours: str, theirs: str, kind: str) -> Conversion:
    """Queries, keys and values: for each group its queries, then its key, then its value."""
    groups, width = config.num_query_groups, config.kv_channels
    rest = (config.hidden_size,) if kind == "weight" else ()
    queries = config.num_attention_heads // groups * width
    parts = (queries, width, width)

    order = _order(config)
    back = None if order is None else order.argsort()

    def join(whole: Sequence[Whole], rank: int, size: int) -> Parts:
        q, k, v = (
            tensor[_part(groups * count, rank, size)].unflatten(0, (groups // size, count))
            for tensor, count in zip(whole, parts, strict=True)
        )
        return Parts([_ordered(q, order), _ordered(k, order), v], 1)

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        fused = _all(shards).unflatten(0, (groups, sum(parts)))
        q, k, v = fused.split(parts, dim=1)
        return [part.flatten(0, 1) for part in (_ordered(q, back), _ordered(k, back), v)]

    names = {
        f"{theirs}{letter}_proj.{kind}": (groups * part, *rest)
        for letter, part in zip("qkv", parts, strict=True)
    }
    return Conversion(ours, names, join, split)


def _order(config: ModelConfig) -> Tensor | None:
    """Which channel of a head each is in Hugging Face; None where they are the same.

    There the channels that turn come first, the first half of them against the second. Here each
    half of a head begins with a half of them, so that a head turns as if all did.
    """
    width, turning = config.kv_channels, config.turning(config.kv_channels)
    if config.position_embedding != "rope" or turning == width:
        return None
    turned, still = torch.arange(turning).chunk(2), torch.arange(turning, width).chunk(2)
    return torch.cat([turned[0], still[0], turned[1], still[1]])


def _ordered(part: Tensor, order: Tensor | None) -> Tensor:
    """Rows [groups, heads * width, ...] with the channels of each head in another order."""
    if order is None:
        return part
    heads = part.unflatten(1, (-1, len(order)))
    return heads.index_select(2, order.to(part.device)).flatten(1, 2)


@dataclass(frozen=True)
class _Turned:
    """A matrix that is held with its dimensions exchanged."""

    whole: Whole

    def __getitem__(self, slices: Any, /) -> Tensor:
        first, *second = slices if isinstance(slices, tuple) else (slices,)
        return self.whole[(*(second or (slice(None),)), first)].t()


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor, `count` from `first`."""

    whole: Whole
    first: int
    count: int

    def __getitem__(self, slices: Any, /) -> Tensor:
        rows, *rest = slices if isinstance(slices, tuple) else (slices,)
        start, stop, _ = rows.indices(self.count)
        return self.whole[(slice(self.first + start, self.first + stop), *rest)]


def turned(conversion: Conversion) -> Conversion:
    """The same from matrices [I, O], where it takes them as [O, I]."""
    return replace(
        conversion,
        theirs={name: shape[::-1] for name, shape in conversion.theirs.items()},
        join=lambda whole, rank, size: conversion.join([*map(_Turned, whole)], rank, size),
        split=lambda shards: [found.t().contiguous() for found in conversion.split(shards)],
    )


def together(conversion: Conversion, name: str) -> Conversion:
    """The same from one tensor, which has the rows of all, one behind the other."""
    shapes = list(conversion.theirs.values())
    counts = [rows for rows, *_ in shapes]

    def join(whole: Sequence[Whole], rank: int, size: int) -> Tensor | Parts:
        firsts = [sum(counts[:number]) for number in range(len(counts))]
        parts = [_Rows(whole[0], *place) for place in zip(firsts, counts, strict=True)]
        return conversion.join(parts, rank, size)

    return replace(
        conversion,
        theirs={name: (sum(counts), *shapes[0][1:])},
        join=join,
        split=lambda shards: [torch.cat(list(conversion.split(shards)))],
    )
