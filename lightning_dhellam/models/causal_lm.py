"""A causal language model made of stock Megatron-core modules.

Shapes: B micro-batch, S sequence, H hidden, V vocabulary. Inside, the layout is [S, B, H], and with
tensor parallelism every rank holds S / TP of the tokens between the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.loss import vocab_parallel_cross_entropy
from lightning_dhellam.models.norm import NORMS
from lightning_dhellam.models.spec import llama_layer_spec
from lightning_dhellam.parallel.context import ParallelContext


class CausalLM(nn.Module):
    """Embedding, transformer layers, final norm and output layer of one rank.

    ``forward`` is the plain autograd path through Megatron's modules: the reference for the
    operator graphs, and how the model runs under Lightning's ordinary strategies. With tensor
    parallelism on the CPU, its backward must run inside ``context.megatron()`` too.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype = torch.float32,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.transformer_config = config.transformer_config(context, dtype)
        self.padded_vocab_size = config.padded_vocab_size(context.tp_size)
        with context.megatron(), _seeded(context, seed):
            self._build(seed)

    def _build(self, seed: int) -> None:
        # Each part draws from its own seed: how far the vocabulary is padded depends on the
        # tensor-parallel size and must not shift the draws of what follows.
        config, groups = self.config, self.context.groups
        self.embedding = LanguageModelEmbedding(
            config=self.transformer_config,
            vocab_size=self.padded_vocab_size,
            max_sequence_length=config.max_sequence_length,
            position_embedding_type="rope",
            tp_group=groups.tp,
        )
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
            use_cpu_initialization=self.transformer_config.use_cpu_initialization,
            cp_group=groups.cp,
        )
        torch.manual_seed(seed + 1)
        spec = llama_layer_spec(config.ffn_hidden_size, config.normalization)
        self.layers = nn.ModuleList(
            build_module(
                spec,
                config=self.transformer_config,
                layer_number=number,
                pg_collection=groups,
            )
            for number in range(1, config.num_layers + 1)
        )
        norm = NORMS[config.normalization]
        self.final_norm = norm(self.transformer_config, config.hidden_size, config.norm_epsilon)
        torch.manual_seed(seed + 2)
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            self.padded_vocab_size,
            config=self.transformer_config,
            init_method=self.transformer_config.embedding_init_method,
            bias=False,
            skip_weight_param_allocation=config.tie_embeddings,
            tp_group=groups.tp,
        )

    @property
    def output_weight(self) -> nn.Parameter:
        """The weight [padded V / TP, H] of the output layer; the embedding's own when tied."""
        if self.config.tie_embeddings:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None
    ) -> Tensor:
        """Logits [B, S, V], or with ``labels`` the loss of every token [B, S] in fp32.

        ``tokens`` [B, S]. ``labels`` [B, S] are the next tokens (already shifted); -100 is ignored.
        ``loss_mask`` [B, S] multiplies the losses. Raises ValueError when S exceeds
        max_sequence_length or is not a multiple of tensor_parallel_size.
        """
        self._check_length(tokens.size(1))
        with self.context.megatron():
            rotary = self.rotary(tokens.size(1))
            hidden = self.embedding(tokens, None)
            with self._dropout_generator():
                for layer in self.layers:
                    if isinstance(layer, TransformerLayer):
                        hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
                    else:  # a block of the user's own, from hidden states to hidden states
                        hidden = layer(hidden)
            hidden = self.final_norm(hidden)
            logits, _ = self.output_layer(hidden, weight=self.output_weight)
            logits = logits.transpose(0, 1)
            if labels is None:
                logits = gather_from_tensor_model_parallel_region(
                    logits, group=self.context.groups.tp
                )
                return logits[..., : self.config.vocab_size]
            losses = vocab_parallel_cross_entropy(
                logits, labels, self.config.vocab_size, self.context
            )
        return losses if loss_mask is None else losses * loss_mask

    def _dropout_generator(self) -> AbstractContextManager[None]:
        # Ranks hold different tokens between the layers, so they must draw different masks.
        if self.transformer_config.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return nullcontext()

    def _check_length(self, length: int) -> None:
        if length > self.config.max_sequence_length:
            raise ValueError(
                f"sequences of {length} tokens exceed "
                f"max_sequence_length={self.config.max_sequence_length}: shorten them or raise it"
            )
        if length % self.context.tp_size:
            raise ValueError(
                f"sequence length {length} is not a multiple of "
                f"tensor_parallel_size={self.context.tp_size}: every rank holds an equal share"
            )


@contextmanager
def _seeded(context: ParallelContext, seed: int) -> Iterator[None]:
    """Draw from generators seeded by ``seed``, then put the caller's generators back."""
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(
            seed, tp_rank=context.tp_rank, ep_rank=context.ep_rank, etp_rank=0
        )
        yield
