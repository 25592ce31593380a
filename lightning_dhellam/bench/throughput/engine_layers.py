"""Hugging Face's Llama whose layers are transformer-engine's own, in 8 bits."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dhellam.bench.throughput.settings import Case

_RECIPES = {"current": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}
_MISSING = (
    "this side needs transformer-engine: pip install --no-build-isolation"
    " 'transformer-engine[pytorch]', or leave it out of --sides"
)


class EngineLayer(nn.Module):
    """A decoder layer of Hugging Face's, computed by a `TransformerLayer` with its weights.

    Args:
        theirs: The layer that it replaces.
        config: Of the model.
        angles: Of rotary embedding, [S, 1, 1, D].
        fp8: The format.

    Attributes:
        is_first: Whether the micro-batch is the first of its step: then weights are cast.

    Raises:
        ValueError: transformer-engine is not installed, or has no such recipe.
    """

    def __init__(self, theirs: nn.Module, config: Any, angles: Tensor, fp8: str) -> None:
        super().__init__()
        engine, recipes = _library()
        make = getattr(recipes, _RECIPES[fp8], None)
        if make is None:
            raise ValueError(
                f"this transformer-engine has no {_RECIPES[fp8]}: pip install -U"
                " 'transformer-engine[pytorch]', or leave this side out of --sides"
            )
        self._recipe = make()
        self._autocast = engine.fp8_autocast
        self._angles = (angles,)  # no buffer, which bf16-true would round
        self.is_first = True
        self.layer = engine.TransformerLayer(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            num_gqa_groups=config.num_key_value_heads,
            kv_channels=config.head_dim,
            layernorm_epsilon=config.rms_norm_eps,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            self_attn_mask_type="causal",
            params_dtype=torch.bfloat16,
            bias=False,
            activation="swiglu",
            normalization="RMSNorm",
            fuse_qkv_params=False,
            attn_input_format="bshd",
            device=angles.device,
        )
        _take_weights(self.layer, theirs)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        (angles,) = self._angles
        with self._autocast(enabled=True, fp8_recipe=self._recipe):
            found: Tensor = self.layer(
                hidden_states,
                rotary_pos_emb=angles[: hidden_states.shape[1]],
                is_first_microbatch=self.is_first,
            )
        return found


def replace_layers(net: Any, case: Case, fp8: str) -> list[EngineLayer]:
    """Put transformer-engine's layers, in 8 bits, in the place of those of `net`.

    Raises:
        ValueError: It is not installed, or the case has what these layers do not do.
    """
    if case.lora is not None or case.recompute not in (None, "none"):
        raise ValueError(
            "sides of transformer-engine have neither adapters nor gradient checkpointing: leave"
            " them out for such cases"
        )
    _library()
    frequencies = net.model.rotary_emb.inv_freq.float()
    places = torch.arange(case.length, device=frequencies.device, dtype=torch.float32)
    half = torch.outer(places, frequencies)
    angles = torch.cat([half, half], dim=-1)[:, None, None]
    layers = [EngineLayer(theirs, net.config, angles, fp8) for theirs in net.model.layers]
    net.model.layers = nn.ModuleList(layers)
    return layers


def _library() -> tuple[Any, Any]:
    """The modules of layers and of recipes."""
    try:
        return (
            importlib.import_module("transformer_engine.pytorch"),
            importlib.import_module("transformer_engine.common.recipe"),
        )
    except ImportError as error:
        raise ValueError(_MISSING) from error


@torch.no_grad()
def _take_weights(layer: Any, theirs: Any) -> None:
    """Copy the weights of Hugging Face's layer."""
    attention, mlp = theirs.self_attn, theirs.mlp
    qkv, own = layer.self_attention.layernorm_qkv, layer.layernorm_mlp
    pairs = (
        (qkv.layer_norm_weight, theirs.input_layernorm.weight),
        (qkv.query_weight, attention.q_proj.weight),
        (qkv.key_weight, attention.k_proj.weight),
        (qkv.value_weight, attention.v_proj.weight),
        (layer.self_attention.proj.weight, attention.o_proj.weight),
        (own.layer_norm_weight, theirs.post_attention_layernorm.weight),
        (own.fc1_weight, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
        (own.fc2_weight, mlp.down_proj.weight),
    )
    for parameter, weight in pairs:
        parameter.copy_(weight)
