"""Hugging Face `LlamaForCausalLM` tensors to and from this rank's shards.

Everything here works on named tensors, so gradients convert like weights. Megatron fuses what
Hugging Face keeps apart: q, k and v by groups into ``linear_qkv`` (for each group its queries,
then its key, then its value), gate and up into ``linear_fc1`` (each rank's gate rows, then its up
rows), and pads the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.source import check_config, open_weights
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.pipeline.split import stage_of

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
# Old checkpoints store this constant; the model computes it.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_LISTED = 8
_LLAMA = {
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "position_embedding": "rope",
    "linear_bias": False,
    "qkv_bias": False,
}
"""Fields of a `ModelConfig` that tell Llama from other families."""


@dataclass(frozen=True)
class _Rule:
    """How one of our parameters is made of Hugging Face tensors.

    ``join`` makes the shard of a rank from the whole tensors (rank, size); ``split`` makes the
    whole tensors from the shards of all ranks, in rank order. ``layer`` is the number of the layer
    that the parameter is part of, None for the embedding and the head.
    """

    ours: str
    theirs: Mapping[str, tuple[int, ...]]
    join: Callable[[Sequence[Tensor], int, int], Tensor]
    split: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    layer: int | None = None

    def stage(self, model: CausalLM) -> int:
        """The pipeline stage that has the parameter."""
        if self.layer is None or model.context.topology.pp_size == 1:
            return 0
        return stage_of(model.chunk_of(self.layer), model.context.topology.pp_size)


def import_llama(
    model: CausalLM,
    source: Mapping[str, Tensor] | torch.nn.Module | str | PathLike[str],
    config: Any = None,
) -> None:
    """Copy the weights of a `LlamaForCausalLM` into this rank's parameters.

    Every rank passes the whole, of which it takes its layers' shards. Nothing is written unless
    everything fits.

    Args:
        model: to be written.
        source: the folder of a saved model, with its `config.json` and its tensors in safetensors
            or `.bin` files; such a model itself; or its state dict.
        config: what the weights were made with: what `config.json` holds, its path, or a
            `LlamaConfig`. A folder or a model brings its own; a state dict alone is taken on trust,
            with a warning.

    Raises:
        ValueError: the configuration differs from the model's or cannot be expressed, or tensors
            are missing, unexpected or mis-shaped; all are named.
    """
    state_dict, config = open_weights("import_llama", source, config)
    if config is not None:
        check_config(config, model.config)
    rules = list(_rules(model.config, model.padded_vocab_size))
    _check_state_dict(model.config, rules, state_dict)
    parameters = dict(model.named_parameters())
    topology = model.context.topology
    rank, size = topology.tp_rank, topology.tp_size
    with torch.no_grad():
        for rule in _own(rules, model):
            whole = [state_dict[name] for name in rule.theirs]
            parameters[rule.ours].copy_(rule.join(whole, rank, size))


def export_llama(model: CausalLM, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's weights, whole, by their names in `LlamaForCausalLM`; on every rank.

    ``tensors`` exports something else of the same shapes instead, by our parameters' names: for
    example ``{name: parameter.main_grad}``. A tied output layer is left out, as in Hugging Face's
    files. Each is on the device that this rank's tensors are on: after a run Lightning has moved a
    model's to the host. Collective over the tensor-parallel and the pipeline group.
    """
    if tensors is None:
        tensors = dict(model.named_parameters())
    if not isinstance(tensors, Mapping):
        raise ValueError(
            "export_llama takes tensors by their names, such as a model's state_dict(), not a"
            f" {type(tensors).__name__}"
        )
    rules = list(_rules(model.config, model.padded_vocab_size))
    missing = [rule.ours for rule in _own(rules, model) if rule.ours not in tensors]
    if missing:
        raise ValueError(f"tensors to export lack {_listed(missing)}: pass every parameter's")
    exported: dict[str, Tensor] = {}
    for rule in rules:
        exported.update(_whole(rule, model, tensors))
    return exported


def _own(rules: list[_Rule], model: CausalLM) -> list[_Rule]:
    """The rules of the parameters that this rank has a share of."""
    return [rule for rule in rules if rule.stage(model) == model.context.topology.pp_rank]


def _whole(rule: _Rule, model: CausalLM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Hugging Face tensors of a rule, from the stage that has the parameter."""
    context, stage = model.context, rule.stage(model)
    like = next(iter(tensors.values()))
    # NCCL carries nothing that is on the host.
    alone = context.topology.tp_size == context.topology.pp_size == 1
    device = like.device if alone else context.device
    if stage == context.topology.pp_rank:
        found = rule.split(_gather(tensors[rule.ours].detach().to(device), context))
    else:
        found = [like.new_empty(shape, device=device) for shape in rule.theirs.values()]
    if context.topology.pp_size > 1:
        found = [tensor.contiguous() for tensor in found]
        for tensor in found:
            dist.broadcast(tensor, group=context.groups.pp, group_src=stage)
    return {name: part.to(like.device) for name, part in zip(rule.theirs, found, strict=True)}


def _gather(shard: Tensor, context: ParallelContext) -> list[Tensor]:
    if context.topology.tp_size == 1:
        return [shard.clone()]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(context.topology.tp_size)]
    dist.all_gather(shards, shard, group=context.groups.tp)
    return shards


def _rules(config: ModelConfig, padded_vocab_size: int) -> Iterator[_Rule]:
    other = [
        f"{name}={getattr(config, name)!r}"
        for name, own in _LLAMA.items()
        if getattr(config, name) != own
    ]
    if other:
        raise ValueError(
            f"{', '.join(other)}: LlamaForCausalLM has RMSNorm, swiglu and rotary embedding only,"
            " and no biases here, so there is nothing to convert"
        )
    table = (config.vocab_size, config.hidden_size)
    yield _vocabulary("embedding.word_embeddings.weight", _EMBEDDING, table, padded_vocab_size)
    for index in range(config.num_layers):
        for rule in _layer_rules(config, f"layers.{index}.", f"model.layers.{index}."):
            yield replace(rule, layer=index)
    yield _replicated("final_norm.weight", "model.norm.weight", (config.hidden_size,))
    if not config.tie_embeddings:
        yield _vocabulary("output_layer.weight", _HEAD, table, padded_vocab_size)


def _layer_rules(config: ModelConfig, ours: str, theirs: str) -> Iterator[_Rule]:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    queries = config.num_attention_heads * config.kv_channels
    yield _replicated(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,))
    yield _attention_input(config, f"{ours}self_attention.linear_qkv.weight", f"{theirs}self_attn.")
    yield _columns(
        f"{ours}self_attention.linear_proj.weight",
        f"{theirs}self_attn.o_proj.weight",
        (hidden, queries),
    )
    yield _replicated(
        f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)
    )
    yield _gate_and_up(f"{ours}mlp.linear_fc1.weight", f"{theirs}mlp.", (ffn, hidden))
    yield _columns(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn))


def _replicated(ours: str, theirs: str, shape: tuple[int, ...]) -> _Rule:
    return _Rule(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0],
        split=lambda shards: [shards[0]],
    )


def _columns(ours: str, theirs: str, shape: tuple[int, ...]) -> _Rule:
    return _Rule(
        ours,
        {theirs: shape},
        join=lambda whole, rank, size: whole[0].chunk(size, dim=1)[rank],
        split=lambda shards: [torch.cat(list(shards), dim=1)],
    )


def _vocabulary(ours: str, theirs: str, shape: tuple[int, int], padded_rows: int) -> _Rule:
    rows, width = shape

    def join(whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        padding = whole[0].new_zeros(padded_rows - rows, width)
        return torch.cat([whole[0], padding]).chunk(size)[rank]

    return _Rule(
        ours, {theirs: shape}, join=join, split=lambda shards: [torch.cat(list(shards))[:rows]]
    )


def _gate_and_up(ours: str, theirs: str, shape: tuple[int, int]) -> _Rule:
    def join(whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in whole])

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]

    names = {f"{theirs}{part}_proj.weight": shape for part in ("gate", "up")}
    return _Rule(ours, names, join, split)


def _attention_input(config: ModelConfig, ours: str, theirs: str) -> _Rule:
    groups, width, hidden = config.num_query_groups, config.kv_channels, config.hidden_size
    queries = config.num_attention_heads // groups * width
    parts = (queries, width, width)

    def join(whole: Sequence[Tensor], rank: int, size: int) -> Tensor:
        grouped = [tensor.view(groups, -1, hidden) for tensor in whole]
        return torch.cat(grouped, dim=1).chunk(size)[rank].reshape(-1, hidden)

    def split(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        fused = torch.cat(list(shards)).view(groups, sum(parts), hidden)
        return [part.reshape(-1, hidden) for part in fused.split(parts, dim=1)]

    names = {
        f"{theirs}{letter}_proj.weight": (groups * part, hidden)
        for letter, part in zip("qkv", parts, strict=True)
    }
    return _Rule(ours, names, join, split)


def _check_state_dict(
    config: ModelConfig, rules: list[_Rule], state_dict: Mapping[str, Tensor]
) -> None:
    expected = {name: shape for rule in rules for name, shape in rule.theirs.items()}
    allowed = {*expected, _HEAD} if config.tie_embeddings else set(expected)
    missing = [name for name in expected if name not in state_dict]
    unexpected = [
        name for name in state_dict if name not in allowed and not name.endswith(_DERIVED_SUFFIX)
    ]
    misshaped = [
        f"{name} {tuple(state_dict[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            "the state dict does not fit the model: " + "; ".join(problems) + ". "
            "Choose the ModelConfig of the checkpoint"
        )
    head = state_dict.get(_HEAD) if config.tie_embeddings else None
    if head is not None and not torch.equal(head, state_dict[_EMBEDDING]):
        raise ValueError(
            f"{_HEAD} differs from {_EMBEDDING}, but tie_embeddings=True makes them one: set "
            f"tie_embeddings=False"
        )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
