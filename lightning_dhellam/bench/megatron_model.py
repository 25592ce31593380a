"""Megatron-core's own model of a rank, with the weights that ours starts from.

On GPUs it has every fusion that is installed, as Megatron's users train: transformer-engine's
modules, or else Megatron's own with torch's fused norm and attention. On a CPU it is made of the
same modules that ours is made of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_with_interleaving,
    get_forward_backward_func,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lightning_dhellam.bench.ring_attention import RingCoreAttention
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.models.attention import SdpaCoreAttention
from lightning_dhellam.models.norm import NORMS, LayerNorm, RMSNorm
from lightning_dhellam.models.spec import layer_spec
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan.placement import Placement

_OURS = {"decoder.final_layernorm.": "final_norm.", "decoder.layers.": "layers."}
# Transformer-engine's linear layers have the norm before them inside.
_INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class FusedRMSNorm(RMSNorm):
    """Torch's fused norm, with the marks that sequence parallelism needs."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden] to the same shape and dtype."""
        return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FusedLayerNorm(LayerNorm):
    """Torch's fused norm with a bias, with those marks."""

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., hidden] to the same shape and dtype."""
        shape = self.weight.shape
        return torch.nn.functional.layer_norm(x, shape, self.weight, self.bias, self.eps)


_FUSED = {"RMSNorm": FusedRMSNorm, "LayerNorm": FusedLayerNorm}


def has_transformer_engine() -> bool:
    """Whether Megatron's modules for transformer-engine can be used."""
    return importlib.util.find_spec("transformer_engine") is not None


def gpt_model(
    shape: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype = torch.float32,
    *,
    transformer_engine: bool = False,
) -> GPTModel:
    """`GPTModel` of this rank: with pipeline parallelism an equal share of the layers, in order.

    Call it inside of `context.megatron()`.
    """
    (model,) = gpt_chunks(shape, context, dtype, transformer_engine=transformer_engine)
    return model


def gpt_chunks(
    shape: ModelConfig,
    context: ParallelContext,
    dtype: torch.dtype = torch.float32,
    *,
    chunks: int = 1,
    transformer_engine: bool = False,
    overlapped_tokens: int = 0,
) -> list[GPTModel]:
    """`GPTModel` of each chunk of this rank, of equal shares of the layers that go round.

    Call it inside of `context.megatron()`. With several chunks a stage Megatron-core interleaves
    them, and sends beside compute, as its own training script has it. With the
    `overlapped_tokens` of a micro-batch transformer-engine's modules overlap tensor-parallel
    communication.
    """
    config = shape.transformer_config(context, dtype)
    if overlapped_tokens:
        _overlap(config, overlapped_tokens, context)
    topology = context.topology
    config.pipeline_model_parallel_size = topology.pp_size
    config.pipeline_dtype = dtype
    if chunks > 1:
        config.virtual_pipeline_model_parallel_size = chunks
        config.microbatch_group_size_per_vp_stage = topology.pp_size
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
    count = topology.pp_size * chunks
    each = shape.num_layers // count
    norm: Any = NORMS[shape.normalization]
    if context.device.type == "cuda":
        _fuse(config, transformer_engine)
        norm = _FUSED[shape.normalization]
    # Its generators must exist on a GPU, whatever they draw.
    model_parallel_cuda_manual_seed(1, tp_rank=topology.tp_rank, ep_rank=0, etp_rank=0)
    models = []
    for number in range(chunks):
        place = topology.pp_rank + number * topology.pp_size
        first = each * place
        specs = [layer_spec(shape, index, config) for index in range(first, first + each)]
        if topology.cp_size > 1:
            specs = [_sharing_sequences(spec) for spec in specs]
        if context.device.type == "cuda":
            specs = [_with_norm(spec, norm) for spec in specs]
            if transformer_engine:
                spec, norm = _of_transformer_engine(config)
                specs = [spec] * each
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),
            vocab_size=shape.padded_vocab_size(topology.tp_size),
            max_sequence_length=shape.max_sequence_length,
            pre_process=place == 0,
            post_process=place == count - 1,
            position_embedding_type="rope",
            rotary_base=int(shape.rotary_base),
            share_embeddings_and_output_weights=shape.tie_embeddings,
            pg_collection=context.groups,
            vp_stage=number if chunks > 1 else None,
        )
        models.append((first, model))
    # All layers at once: on a stage of its own, ours would have two chunks of other layers.
    whole = replace(
        context,
        topology=topology.stage,
        edges={},
        pipeline_split=(),
        placement=Placement.folded(1),
    )
    ours = dict(CausalLM(shape, whole, dtype).named_parameters())
    with torch.no_grad():
        for first, model in models:
            for name, parameter in model.named_parameters():
                parameter.copy_(ours[_our_name(name, first)])
    # A router draws its weight on the host, whatever device the others are made on.
    return [model.to(context.device) for _, model in models]


def _overlap(config: TransformerConfig, tokens: int, context: ParallelContext) -> None:
    """Switch on what Megatron-core's `--tp-comm-overlap` does, as its training script does it."""
    from transformer_engine.pytorch.module.base import initialize_ub

    config.tp_comm_overlap = True
    initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=context.topology.tp_size,
        dtype=config.params_dtype,
        bootstrap_backend="nccl",
    )


def _fuse(config: TransformerConfig, transformer_engine: bool) -> None:
    config.bias_activation_fusion = True
    config.bias_dropout_fusion = True
    config.cross_entropy_loss_fusion = True
    config.cross_entropy_fusion_impl = "native"
    config.apply_rope_fusion = transformer_engine
    fused = importlib.util.find_spec("fused_weight_gradient_mlp_cuda")
    config.gradient_accumulation_fusion = fused is not None


def _of_transformer_engine(config: TransformerConfig) -> tuple[ModuleSpec, Any]:
    """The modules of a dense layer, and the last norm."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    theirs = get_gpt_layer_with_transformer_engine_spec()
    # Which of its own attentions it takes depends on what else is installed, and with flash-attn 4
    # its version 2.20 computes something else. Fused is cuDNN's, its fastest on Hopper.
    config.attention_backend = AttnBackend.fused
    if config.context_parallel_size == 1:  # which torch has as well, but for shared sequences
        theirs.submodules.self_attention.submodules.core_attention = SdpaCoreAttention
    return theirs, TENorm


def _with_norm(spec: ModuleSpec, norm: type) -> ModuleSpec:
    norms = dict.fromkeys(("input_layernorm", "pre_mlp_layernorm"), norm)
    return replace(spec, submodules=replace(spec.submodules, **norms))


def _sharing_sequences(spec: ModuleSpec) -> ModuleSpec:
    """The same layer with attention over the tokens of all context-parallel ranks."""
    parts = spec.submodules
    attention = parts.self_attention
    inner = replace(attention.submodules, core_attention=RingCoreAttention)
    return replace(
        spec, submodules=replace(parts, self_attention=replace(attention, submodules=inner))
    )


def _our_name(name: str, first: int) -> str:
    """Megatron numbers the layers of a stage from 0."""
    for theirs, ours in _OURS.items():
        if not name.startswith(theirs):
            continue
        rest = name.removeprefix(theirs)
        if ours != "layers.":
            return ours + rest
        number, _, inner = rest.partition(".")
        return f"{ours}{first + int(number)}.{_INSIDE.get(inner, inner)}"
    return name


def forward_backward(chunks: int) -> Callable[..., Any]:
    """Megatron-core's function for forward and backward of a step, by its chunks on a stage."""
    if chunks > 1:
        return cast(Callable[..., Any], forward_backward_pipelining_with_interleaving)
    return cast(Callable[..., Any], get_forward_backward_func())


def forward_step(pieces: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    """A micro-batch through the model, for Megatron's schedules: what it returns, and the loss."""
    tokens, labels = next(pieces)
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    losses = model(tokens, positions, None, labels=labels)
    return losses, partial(_mean, model.config.context_parallel_size)


def _mean(sharing: int, losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of this rank's tokens, which `sharing` ranks share with it, and their mean."""
    mean = losses.float().mean()
    # The schedule takes it for this rank's share of the whole. It divides a loss by the number of
    # micro-batches in place, so what is reported must be another tensor.
    return mean / sharing, {"loss": mean.detach().clone()}


def cut_in_pieces(batch: dict[str, Tensor], micro_batch: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels [b, S] of each micro-batch, from those of the batch [B, S]."""
    parts = (batch[name].split(micro_batch) for name in ("tokens", "labels"))
    return list(zip(*parts, strict=True))
