"""How each parameter of a rank is made of whole tensors by the names of Hugging Face.

One table for import, export and their messages. Megatron fuses what Hugging Face keeps apart: q, k
and v by groups into ``linear_qkv`` (for each group its queries, then its key, then its value), gate
and up into ``linear_fc1`` (each rank's gate rows, then its up rows), and pads the vocabulary.
Experts are tensors of their own, spread over expert ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.conversion import (
    Conversion,
    attention_input,
    columns,
    gate_and_up,
    norm,
    replicated,
    rows,
    together,
    turned,
    vocabulary,
)

EMBEDDING = "model.embed_tokens.weight"
GPT2_EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


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
    yield vocabulary("embedding.word_embeddings.weight", EMBEDDING, table, padded_rows)
    for index, has_experts in enumerate(config.expert_layers):
        for conversion in _layer(config, f"layers.{index}.", f"model.layers.{index}."):
            yield replace(conversion, layer=index)
        if has_experts:
            yield from _experts(config, names, index, own_experts)
        else:
            yield from _dense(config, index)
    yield from norm(config, "final_norm", "model.norm", config.hidden_size)
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", HEAD, table, padded_rows)
    if config.output_bias:
        yield vocabulary("output_layer.bias", "lm_head.bias", table[:1], padded_rows)


def fused_conversions(
    config: ModelConfig, names: MixtureNames, padded_rows: int, own_experts: int
) -> Iterator[Conversion]:
    """The conversions of Llama, of files with q, k and v in one tensor, gate and up in another."""
    for one in conversions(config, names, padded_rows, own_experts):
        first, *others = one.theirs
        name = first.replace(".q_proj.", ".qkv_proj.").replace(".gate_proj.", ".gate_up_proj.")
        yield together(one, name) if others else one


def gpt2_conversions(
    config: ModelConfig, names: MixtureNames, padded_rows: int, own_experts: int
) -> Iterator[Conversion]:
    """The conversions of GPT-2, whose files hold weights turned, and q, k and v together."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    table, places = (config.vocab_size, hidden), (config.max_sequence_length, hidden)
    yield vocabulary("embedding.word_embeddings.weight", GPT2_EMBEDDING, table, padded_rows)
    yield replicated("embedding.position_embeddings.weight", "transformer.wpe.weight", places)
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}.", f"transformer.h.{index}."
        qkv, proj = f"{ours}self_attention.linear_qkv", f"{ours}self_attention.linear_proj"
        fc1, fc2 = f"{ours}mlp.linear_fc1", f"{ours}mlp.linear_fc2"
        attention, mlp = f"{theirs}attn.", f"{theirs}mlp."
        whole = attention_input(config, f"{qkv}.weight", attention, "weight")
        bias = attention_input(config, f"{qkv}.bias", attention, "bias")
        for conversion in (
            *norm(config, f"{ours}input_layernorm", f"{theirs}ln_1", hidden),
            turned(together(whole, f"{attention}c_attn.weight")),
            together(bias, f"{attention}c_attn.bias"),
            turned(columns(f"{proj}.weight", f"{attention}c_proj.weight", (hidden, hidden))),
            replicated(f"{proj}.bias", f"{attention}c_proj.bias", (hidden,)),
            *norm(config, f"{ours}pre_mlp_layernorm", f"{theirs}ln_2", hidden),
            turned(rows(f"{fc1}.weight", f"{mlp}c_fc.weight", (ffn, hidden))),
            rows(f"{fc1}.bias", f"{mlp}c_fc.bias", (ffn,)),
            turned(columns(f"{fc2}.weight", f"{mlp}c_proj.weight", (hidden, ffn))),
            replicated(f"{fc2}.bias", f"{mlp}c_proj.bias", (hidden,)),
        ):
            yield replace(conversion, layer=index)
    yield from norm(config, "final_norm", "transformer.ln_f", hidden)
    if not config.tie_embeddings:
        yield vocabulary("output_layer.weight", HEAD, table, padded_rows)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Conversion]:
    """Norms and attention of a layer."""
    hidden, attention = config.hidden_size, f"{ours}self_attention."
    queries = config.num_attention_heads * config.kv_channels
    after = f"{theirs}post_attention_layernorm"
    if config.post_norm:
        yield from norm(config, f"{ours}self_attn_bda.norm", after, hidden)
        of_mlp = f"{theirs}post_feedforward_layernorm"
        yield from norm(config, f"{ours}mlp_bda.norm", of_mlp, hidden)
    else:
        yield from norm(config, f"{ours}input_layernorm", f"{theirs}input_layernorm", hidden)
        yield from norm(config, f"{ours}pre_mlp_layernorm", after, hidden)
    yield attention_input(config, f"{attention}linear_qkv.weight", f"{theirs}self_attn.", "weight")
    proj = f"{attention}linear_proj.weight", f"{theirs}self_attn.o_proj.weight"
    yield columns(*proj, (hidden, queries))
    if config.attention_bias or config.qkv_bias:
        yield attention_input(config, f"{attention}linear_qkv.bias", f"{theirs}self_attn.", "bias")
    if config.attention_bias:
        bias = f"{attention}linear_proj.bias", f"{theirs}self_attn.o_proj.bias"
        yield replicated(*bias, (hidden,))
    if config.qk_norm:
        heads = {"q": config.num_attention_heads, "k": config.num_query_groups}
        for letter, count in heads.items():
            both = f"{attention}{letter}_layernorm", f"{theirs}self_attn.{letter}_norm"
            if config.qk_norm_whole:
                mine, other = (f"{name}.weight" for name in both)
                yield rows(mine, other, (count * config.kv_channels,))
            else:
                yield from norm(config, *both, config.kv_channels)


def _dense(config: ModelConfig, layer: int) -> Iterator[Conversion]:
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    ours, theirs = f"layers.{layer}.mlp.", f"model.layers.{layer}.mlp."
    both = f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"
    yield replace(gate_and_up(f"{ours}linear_fc1.weight", both, (ffn, hidden)), layer=layer)
    down = columns(f"{ours}linear_fc2.weight", f"{theirs}down_proj.weight", (hidden, ffn))
    yield replace(down, layer=layer)


def _experts(
    config: ModelConfig, names: MixtureNames, layer: int, own_experts: int
) -> Iterator[Conversion]:
    hidden, ffn = config.hidden_size, config.expert_width
    assert config.num_experts is not None
    router = f"model.layers.{layer}.{names.mixture}.{names.router}.weight"
    gate = replicated(f"layers.{layer}.mlp.router.weight", router, (config.num_experts, hidden))
    yield replace(gate, layer=layer)
    for expert in range(config.num_experts):
        ours = f"layers.{layer}.mlp.experts.local_experts.{expert % own_experts}."
        theirs = names.of_expert(layer, expert)
        both = theirs["gate"], theirs["up"]
        for conversion in (
            gate_and_up(f"{ours}linear_fc1.weight", both, (ffn, hidden)),
            columns(f"{ours}linear_fc2.weight", theirs["down"], (hidden, ffn)),
        ):
            yield replace(conversion, layer=layer, expert=expert)
