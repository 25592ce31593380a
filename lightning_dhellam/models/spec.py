"""Which modules a layer is made of, in Megatron's own language."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from lightning_dhellam.layers.post_norm import NormedSum
from lightning_dhellam.layers.wide_norm import WideKeyNorm, WideQueryNorm
from lightning_dhellam.models.attention import SdpaCoreAttention
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.norm import NORMS
from lightning_dhellam.models.rotary import shrinking
from lightning_dhellam.models.router import SparseMixer
from lightning_dhellam.versions import mlp_spec, moe_spec


class _BiasedRowParallelLinear:
    """Makes a `RowParallelLinear` with a bias, where the configuration would give it none.

    Megatron-core has one field for the biases of attention's output, experts and MLPs.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return RowParallelLinear(*args, **{**options, "bias": True})


def layer_spec(config: ModelConfig, index: int, own: TransformerConfig) -> ModuleSpec:
    """Layer `index` of a model: norm, attention, norm, and an MLP or experts.

    ``own`` is Megatron-core's configuration of the model.
    """
    experts = config.expert_layers[index]
    spec = llama_layer_spec(
        config.ffn_hidden_size,
        config.normalization,
        mlp=_experts(config) if experts else None,
        qk_norm=NORMS[config.normalization] if config.qk_norm else None,
        proj=_BiasedRowParallelLinear if config.attention_bias else RowParallelLinear,
        attends=partial(SdpaCoreAttention, shrinking=shrinking(config)),
    )
    parts = spec.submodules
    if config.qk_norm_whole:
        attention = parts.self_attention.submodules
        attention.q_layernorm, attention.k_layernorm = WideQueryNorm, WideKeyNorm
    if config.post_norm:
        made = {"config": own, "make": NORMS[config.normalization]}
        parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
        parts.self_attn_bda = ModuleSpec(module=NormedSum, params=made)
        parts.mlp_bda = ModuleSpec(module=NormedSum, params=made)
    return spec


def llama_layer_spec(
    ffn_hidden_size: int | None = None,
    normalization: str = "RMSNorm",
    *,
    mlp: Any = None,
    qk_norm: type | None = None,
    proj: type = RowParallelLinear,
    attends: Any = SdpaCoreAttention,
) -> ModuleSpec:
    """Pre-norm layer: norm, grouped-query attention, norm, MLP.

    ``ffn_hidden_size`` only spares Megatron's warning that it reads it from its configuration.
    ``mlp`` is another specification than that of an MLP, ``qk_norm`` the norm of each head's
    queries and keys, ``proj`` the class of attention's output projection, ``attends`` what makes
    its core.
    """
    norm = NORMS[normalization]
    mlp_params = {} if ffn_hidden_size is None else {"ffn_hidden_size": ffn_hidden_size}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=attends,
                    linear_proj=proj,
                    q_layernorm=qk_norm,
                    k_layernorm=qk_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(linears(), **mlp_params) if mlp is None else mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _experts(config: ModelConfig) -> Any:
    """A `MoELayer` of experts that are MLPs of their own, with shared ones if there are any."""
    mixer = config.router_scores == "sparsemixer"
    router = partial(SparseMixer, jitter=config.router_jitter) if mixer else TopKRouter
    return moe_spec(router, linears())


def linears() -> MLPSubmodules:
    """The linear layers of an MLP, and of an expert."""
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
