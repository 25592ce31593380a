"""Which fields of Megatron-core's TransformerConfig may have any value.

Every version of Megatron-core brings fields that change what a layer computes, and operators know
only those that this package was written for. So a field is refused unless it is known, and a new
one is refused until somebody has looked at it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from lightning_dhellam.versions import QUIET_FIELDS

# Lowering reads these, or the modules that were built from them.
_READ = """
add_bias_linear add_qkv_bias attention_dropout bf16 context_parallel_size expert_model_parallel_size
expert_tensor_parallel_size ffn_hidden_size fp16 hidden_dropout hidden_size kv_channels
layernorm_epsilon moe_aux_loss_coeff moe_expert_capacity_factor moe_ffn_hidden_size moe_layer_freq
moe_router_bias_update_rate moe_router_enable_expert_bias moe_router_group_topk
moe_router_load_balancing_type moe_router_num_groups moe_router_pre_softmax moe_router_topk
moe_router_topk_scaling_factor moe_shared_expert_gate moe_shared_expert_intermediate_size
moe_z_loss_coeff num_attention_heads num_layers num_moe_experts num_query_groups params_dtype
qk_layernorm sequence_parallel softmax_scale tensor_model_parallel_size
"""
# These are over when a layer exists. Not `perform_initialization`: without it, 0.16 leaves weights
# unmarked that tensor-parallel ranks share out, and they would be taken for alike.
_BUILDING = """
embedding_init_method embedding_init_method_std init_method init_method_std output_layer_init_method
use_cpu_initialization use_te_rng_tracker
"""
# These say how Megatron computes, sends or stores the same numbers: which kernel, in which order.
# Operators and plans have their own ways.
_HOW = """
apply_rope_fusion attention_backend attention_softmax_in_fp32 barrier_with_L1_time batch_p2p_comm
batch_p2p_sync bias_activation_fusion bias_dropout_fusion clone_scatter_output_in_embedding
config_logger_dir cross_entropy_fusion_impl cross_entropy_loss_fusion
cuda_graph_retain_backward_graph cuda_graph_use_single_mempool cuda_graph_warmup_steps
deallocate_pipeline_outputs deterministic_mode disable_bf16_reduced_precision_matmul
disable_parameter_transpose_cache distribute_saved_activations finalize_model_grads_func
flash_attention_version fused_single_qkv_rope grad_sync_func gradient_accumulation_fusion
masked_softmax_fusion memory_efficient_layer_norm microbatch_group_size_per_vp_stage
moe_deepep_num_sms moe_enable_deepep moe_flex_dispatcher_backend moe_grouped_gemm
moe_hybridep_num_sms moe_permute_fusion moe_router_fusion moe_shared_expert_overlap
moe_token_dispatcher_type moe_use_legacy_grouped_gemm no_sync_func
overlap_p2p_comm overlap_p2p_comm_warmup_flush param_sync_func persist_layer_norm pipeline_dtype
pipeline_model_parallel_comm_backend recompute_method recompute_modules recompute_num_layers timers
tp_comm_atomic_ag tp_comm_atomic_rs tp_comm_bootstrap_backend tp_comm_bulk_dgrad tp_comm_bulk_wgrad
tp_comm_overlap tp_comm_overlap_ag tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv
tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs variable_seq_lengths
"""
# Nothing is generated, and nothing is cast by autocast.
_ELSEWHERE = """
async_tensor_model_parallel_allreduce autocast_dtype flash_decode inference_cuda_graph_scope
inference_rng_tracker inference_sampling_seed mlp_chunks_for_prefill
"""

HARMLESS = frozenset(f"{_READ} {_BUILDING} {_HOW} {_ELSEWHERE}".split())
"""Fields whose value changes nothing that lowering would get wrong."""


def check_unknown(config: Any, known: Collection[str]) -> None:
    """Refuse a field with a value that lowering does not know, unless it has its default.

    Args:
        config: a TransformerConfig, or a class of the user's that is one.
        known: fields that are checked elsewhere.

    Raises:
        ValueError: naming the field, its value and its default.
    """
    plain = _plain()
    for field in fields(config):
        if field.name in known or field.name in HARMLESS:
            continue
        own = field.default if field.default_factory is MISSING else field.default_factory()
        default, value = getattr(plain, field.name, own), getattr(config, field.name)
        if value != default:
            raise ValueError(
                f"TransformerConfig.{field.name}={value!r} cannot be lowered to operators: leave"
                f" it at {default!r}"
            )


@cache
def _plain() -> TransformerConfig:
    """A configuration with its defaults, as the constructor leaves them."""
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **QUIET_FIELDS)


def window_of(config: Any, layer_number: int) -> int | None:
    """How many tokens each attends to in a layer, of itself and those before it; None for all.

    Args:
        config: whose `window_size` says how many before a token and after it, -1 for all, and whose
            `window_attn_skip_freq` which layers have the window.
        layer_number: of the layer, from 1.

    Raises:
        ValueError: tokens would attend to later ones.
    """
    size = config.window_size
    if not is_layer_window_attention(size, config.window_attn_skip_freq, layer_number):
        return None
    before, after = size
    if after > 0:
        raise ValueError(
            f"TransformerConfig.window_size={size} cannot be lowered to operators: attention is"
            f" causal, so use ({before}, 0)"
        )
    return None if before < 0 else int(before) + 1
