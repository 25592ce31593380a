"""How each parameter of a rank is made of whole tensors by the names of Hugging Face.

One table for import, export and their messages. Everything here works on named tensors, so that
gradients convert like weights. Megatron fuses what Hugging Face keeps apart: q, k and v by groups
into ``linear_qkv`` (for each group its queries, then its key, then its value), gate and up into
``linear_fc1`` (each rank's gate rows, then its up rows), and pads the vocabulary. Experts are
tensors of their own, spread over expert ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_dhellam.models.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
GPT2_EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"
Shape = tuple[int, ...]


class Whole(Protocol):
    """A whole tensor, of which parts can be had: in memory, or in a file that is read when asked.

    Only ``whole[slices]`` reads anything, and no more than it says.
    """

    def __getitem__(self, slices: Any, /) -> Tensor:
        """A part, by a slice for each dimension up to the last that is cut."""


@dataclass(frozen=True)
class MixtureNames:
    """What families with experts call differently.

    Attributes:
        mixture: the experts and their router, in a layer.
        router: the router among them.
        parts: gate, up and down projection of an expert.
    """

    mixture: str = "mlp"
    router: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def of_expert(self, layer: int, expert: int) -> dict[str, str]:
        """The names of an expert's tensors, by `gate`, `up` and `down`."""
        prefix = f"model.layers.{layer}.{self.mixture}.experts.{expert}."
        named = zip(("gate", "up", "down"), self.parts, strict=True)
        return {part: f"{prefix}{name}.weight" for part, name in named}


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


def conversions(
    config: ModelConfig, names: MixtureNames, padded_rows: int, own_experts: int
) -> Iterator[Conversion]:
    """The conversions of all parameters of a model.

    Args:
        config: of the model.
        names: of its family.
        padded_rows: rows of the vocabulary with padding.
        own_experts: of a layer, that each rank has.
    """
    table = (config.vocab_size, config.hidden_size)
    yield _vocabulary("embedding.word_embeddings.weight", EMBEDDING, table, padded_rows)
    for index, has_experts in enumerate(config.expert_layers):
        for conversion in _layer(config, f"layers.{index}.", f"model.layers.{index}."):
            yield replace(conversion, layer=index)
        if has_experts:
            yield from _experts(config, names, index, own_experts)
        else:
            yield from _dense(config, index)
    yield from _norm(config, "final_norm", "model.norm", config.hidden_size)
    if not config.tie_embeddings:
        yield _vocabulary("output_layer.weight", HEAD, table, padded_rows)
    if config.output_bias:
        yield _vocabulary("output_layer.bias", "lm_head.bias", table[:1], padded_rows)


def gpt2_conversions(
    config: ModelConfig, names: MixtureNames, padded_rows: int, own_experts: int
) -> Iterator[Conversion]:
    """The conversions of GPT-2, whose files hold weights turned, and q, k and v together."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    table, places = (config.vocab_size, hidden), (config.max_sequence_length, hidden)
    yield _vocabulary("embedding.word_embeddings.weight", GPT2_EMBEDDING, table, padded_rows)
    yield _replicated("embedding.position_embeddings.weight", "transformer.wpe.weight", places)
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"transformer.h.{index}."
        qkv, proj = f"{ours}self_attention.linear_qkv", f"{ours}self_attention.linear_proj"
        fc1, fc2 = f"{ours}mlp.linear_fc1", f"{ours}mlp.linear_fc2"
        attention, mlp = f"{theirs}attn.", f"{theirs}mlp."
        whole = _attention_input(config, f"{qkv}.weight", attention, "weight")
        bias = _attention_input(config, f"{qkv}.bias", attention, "bias")
        for conversion in (
            *_norm(config, f"{ours}input_layernorm", f"{theirs}ln_1", hidden),
            _turned(_together(whole, f"{attention}c_attn.weight")),
            _together(bias, f"{attention}c_attn.bias"),
            _turned(_columns(f"{proj}.weight", f"{attention}c_proj.weight", (hidden, hidden))),
            _replicated(f"{proj}.bias", f"{attention}c_proj.bias", (hidden,)),
            *_norm(config, f"{ours}pre_mlp_layernorm", f"{theirs}ln_2", hidden),
            _turned(_rows(f"{fc1}.weight", f"{mlp}c_fc.weight", (ffn, hidden))),
            _rows(f"{fc1}.bias", f"{mlp}c_fc.bias", (ffn,)),
            _turned(_columns(f"{fc2}.weight", f"{mlp}c_proj.weight", (hidden, ffn))),
            _replicated(f"{fc2}.bias", f"{mlp}c_proj.bias", (hidden,)),
        ):
            yield replace(conversion, layer=index)
    yield from _norm(config, "final_norm", "transformer.ln_f", hidden)
    if not config.tie_embeddings:
        yield _vocabulary("output_layer.weight", HEAD, table, padded_rows)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Conversion]:
    """Norms and attention of a layer."""
    hidden, attention = config.hidden_size, f"{ours}self_attention."
    queries = config.num_attention_heads * config.kv_channels
    yield from _norm(config, f"{ours}input_layernorm", f"{theirs}input_layernorm", hidden)
    yield _attention_input(config, f"{attention}linear_qkv.weight", f"{theirs}self_attn.", "weight")
    proj = f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight"
    yield _columns(*proj, (hidden, queries))
    if config.attention_bias or config.qkv_bias:
        yield _attention_input(config, f"{attention}linear_qkv.bias", f"{theirs}self_attn.", "bias")
    if config.attention_bias:
        bias = f"{attention}linear_proj.bias", f"{theirs}self_attn.o_proj.bias"
        yield _replicated(*bias, (hidden,))
    if config.qk_norm:
        for letter in "qk":
            norm = f"{attention}{letter}_layernorm", f"{theirs}self_attn.{letter}_norm"
            yield from _norm(config, *norm, config.kv_channels)
    after = f"{theirs}post_attention_layernorm"
    yield from _norm(config, f"{ours}pre_mlp_layernorm", after, hidden)


def _dense(config: ModelConfig, layer: int) -> Iterator[Conversion]:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    ours, theirs = f"layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    both = f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"
    yield replace(_gate_and_up(f"{ours}linear_fc1.weight", both, (ffn, hidden)), layer=layer)
    down = _columns(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, ffn))
    yield replace(down, layer=layer)


def _experts(
    config: ModelConfig, names: MixtureNames, layer: int, own_experts: int
) -> Iterator[Conversion]:
    hidden, ffn = config.hidden_size, config.expert_width
    assert config.num_experts is not None
    router = f"model.layers.{layer}.{names.mixture}.{names.router}.weight"
    gate = _replicated(f"layers.{layer}.mlp.router.weight", router, (config.num_experts, hidden))
    yield replace(gate, layer=layer)
    for expert in range(config.num_experts):
        ours = f"layers.{layer}.mlp.experts.local_experts.{expert % own_experts}."
        theirs = names.of_expert(layer, expert)
        both = theirs["gate"], theirs["up"]
        for conversion in (
            _gate_and_up(f"{ours}linear_fc1.weight", both, (ffn, hidden)),
            _columns(f"{ours}linear_fc2.weight", theirs["down"], (hidden, ffn)),
        ):
            yield replace(conversion, layer=layer, expert=expert)


def _part(rows: int, rank: int, size: int) -> slice:
    """The share of a rank, of rows or columns of which all have equally many."""
    assert rows % size == 0, "refused when the model is made"
    return slice(rank * rows // size, (rank + 1) * rows // size)


def _all(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """The shards of all ranks side by side; one alone is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)


def _norm(config: ModelConfig, ours: str, theirs: str, width: int) -> Iterator[Conversion]:
    for part in ("weight",) if config.normalization == "RMSNorm" else ("weight", "bias"):
        yield _replicated(f"{ours}.{part}", f"{theirs}.{part}", (width,))


def _replicated(ours: str, theirs: str, shape: Shape) -> Conversion:
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][:],
        split=lambda shards: [shards[0]],
    )


def _rows(ours: str, theirs: str, shape: Shape) -> Conversion:
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][_part(shape[0], rank, size)],
        split=lambda shards: [_all(shards)],
    )


def _columns(ours: str, theirs: str, shape: Shape) -> Conversion:
    return Conversion(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0][:, _part(shape[1], rank, size)],
        split=lambda shards: [_all(shards, 1)],
    )


def _vocabulary(ours: str, theirs: str, shape: Shape, padded_rows: int) -> Conversion:
    rows, *rest = shape

    def join(whole: Sequence[Whole], rank: int, size: int) -> Tensor | Parts:
        part = _part(padded_rows, rank, size)
        own = whole[0][min(part.start, rows) : min(part.stop, rows)]
        padding = part.stop - part.start - len(own)
        return Parts([own, own.new_zeros(padding, *rest)]) if padding else own

    return Conversion(ours, {theirs: shape}, join=join, split=lambda shards: [_all(shards)[:rows]])


def _gate_and_up(ours: str, theirs: tuple[str, str], shape: Shape) -> Conversion:
    def join(whole: Sequence[Whole], rank: int, size: int) -> Parts:
        return Parts([tensor[_part(shape[0], rank, size)] for tensor in whole])

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_all([half[part] for half in halves]) for part in range(2)]

    return Conversion(ours, dict.fromkeys(theirs, shape), join, split)


def _attention_input(config: ModelConfig, ours: str, theirs: str, kind: str) -> Conversion:
    groups, width = config.num_query_groups, config.kv_channels
    rest = (config.hidden_size,) if kind == "weight" else ()
    queries = config.num_attention_heads // groups * width
    parts = (queries, width, width)

    def join(whole: Sequence[Whole], rank: int, size: int) -> Parts:
        own = [
            tensor[_part(groups * rows, rank, size)].unflatten(0, (groups // size, rows))
            for tensor, rows in zip(whole, parts, strict=True)
        ]
        return Parts(own, 1)

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        fused = _all(shards).unflatten(0, (groups, sum(parts)))
        return [part.flatten(0, 1) for part in fused.split(parts, dim=1)]

    names = {
        f"{theirs}{letter}_proj.{kind}": (groups * part, *rest)
        for letter, part in zip("qkv", parts, strict=True)
    }
    return Conversion(ours, names, join, split)


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


def _turned(conversion: Conversion) -> Conversion:
    """The same from matrices [I, O], where it takes them as [O, I]."""
    return replace(
        conversion,
        theirs={name: shape[::-1] for name, shape in conversion.theirs.items()},
        join=lambda whole, rank, size: conversion.join([*map(_Turned, whole)], rank, size),
        split=lambda shards: [found.t().contiguous() for found in conversion.split(shards)],
    )


def _together(conversion: Conversion, name: str) -> Conversion:
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
