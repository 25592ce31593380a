"""Which modules a layer is made of, in Megatron's own language."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from lightning_dhellam.models.attention import SdpaCoreAttention
from lightning_dhellam.models.norm import NORMS
from lightning_dhellam.versions import mlp_spec


def llama_layer_spec(
    ffn_hidden_size: int | None = None, normalization: str = "RMSNorm"
) -> ModuleSpec:
    """Pre-norm layer: norm, grouped-query attention, norm, MLP.

    ``ffn_hidden_size`` only spares Megatron's warning that it reads it from its configuration.
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
                    core_attention=SdpaCoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(
                MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
                **mlp_params,
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
