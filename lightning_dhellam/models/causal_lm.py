"""A causal language model made of stock Megatron-core modules.

Shapes: B micro-batch, S sequence, H hidden, V vocabulary. Inside, the layout is [S, B, H], and with
tensor parallelism every rank holds S / TP of the tokens between the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
    scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from lightning_dhellam.layers.sequence import is_token_wise, of_whole_sequences
from lightning_dhellam.layers.wide_norm import WideNorm
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.drawing import draw_experts, draw_part, seeded
from lightning_dhellam.models.lora import LoRA
from lightning_dhellam.models.loss import vocab_parallel_cross_entropy
from lightning_dhellam.models.norm import NORMS
from lightning_dhellam.models.rotary import ScaledRotary, is_scaled
from lightning_dhellam.models.spec import layer_spec
from lightning_dhellam.models.stage import Elsewhere, check_order, chunks_of_layers, is_here
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import ExpertNames, mark_experts


class CausalLM(nn.Module):
    """Embedding, transformer layers, final norm and output layer of one rank.

    With pipeline parallelism a rank builds only the layers of its own chunks, at their places in
    ``layers``. The stage of the first chunk has the embedding, that of the last one final norm and
    output layer; they are None on all others.

    ``forward`` is the plain autograd path through Megatron's modules: the reference for the
    operator graphs, and how the model runs under Lightning's ordinary strategies. With tensor
    parallelism on the CPU, its backward must run inside ``context.megatron()`` too.

    Args:
        config: of the model.
        context: of this rank.
        dtype: of the weights.
        seed: that the first weights are drawn with.
        drawn: whether they are drawn. One whose weights are not only holds others for a while; it
            cannot be trained.

    Attributes:
        origin: the folder of Hugging Face whose weights it was given last, if any.
        trains_tied: whether stages exchange the gradient of a weight that they share, as both of
            them must know; see `train_tied`.
        lora: what adapters its linear layers have been given, or None.
    """

    lora: LoRA | None = None

    def __init__(
        self,
        config: ModelConfig,
        context: ParallelContext,
        dtype: torch.dtype = torch.float32,
        seed: int = 1234,
        *,
        drawn: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.context = context
        self.origin: Path | None = None
        self.trains_tied = True
        self.transformer_config = config.transformer_config(context, dtype)
        self.transformer_config.perform_initialization = drawn
        self.padded_vocab_size = config.padded_vocab_size(context.topology.tp_size)
        with context.megatron(), seeded(context, seed):
            self._build(seed)

    def _build(self, seed: int) -> None:
        # Each part draws from its own seed: how far the vocabulary is padded depends on the
        # tensor-parallel size, and which layers are built on the pipeline stage; neither must
        # shift the draws of what follows.
        config, context = self.config, self.context
        stage, placement = context.topology.pp_rank, context.placement
        self.embedding = self._build_embedding(seed) if stage == placement.first else None
        self.rotary = self._build_rotary() if config.position_embedding == "rope" else None
        self.layers = nn.ModuleList()
        for index, chunk in enumerate(chunks_of_layers(config, context)):
            self.layers.append(
                self._build_layer(index, chunk, seed)
                if is_here(chunk, context)
                else Elsewhere(chunk)
            )
        if config.qk_norm_whole:
            # Megatron-core adds up the gradients of norms of queries and keys over tensor-parallel
            # ranks if this says that there are some; of these each rank has weights of its own.
            self.transformer_config.qk_layernorm = False
        self.final_norm = self.output_layer = None
        if stage == placement.last:
            norm = NORMS[config.normalization]
            self.final_norm = norm(self.transformer_config, config.hidden_size, config.norm_epsilon)
            draw_part(context, seed, 1)
            self.output_layer = self._build_output()
        copied = self.config.tie_embeddings and self.output_layer is not None
        # In a tuple, as the model is not to find it among its parameters.
        self._tied_copy = (self._build_copy() if copied and self.embedding is None else None,)

    def _build_embedding(self, seed: int) -> LanguageModelEmbedding:
        learned = self.config.position_embedding == "learned"
        embedding = LanguageModelEmbedding(
            config=self.transformer_config,
            vocab_size=self.padded_vocab_size,
            max_sequence_length=self.config.max_sequence_length,
            position_embedding_type="learned_absolute" if learned else "none",
            tp_group=self.context.groups.tp,
        )
        embedding.embedding_dropout.p = self.config.dropout_of_embedding
        if learned:
            # Megatron-core leaves it on the host and in fp32, and draws it after the vocabulary,
            # which is padded to a multiple of the tensor-parallel size.
            draw_part(self.context, seed, 2 + self.config.num_layers)
            table = embedding.position_embeddings
            weight = table.weight.data
            table.weight.data = weight.to(self.context.device, self.transformer_config.params_dtype)
            if self.transformer_config.perform_initialization:
                self.transformer_config.embedding_init_method(table.weight)
        return embedding

    def _build_rotary(self) -> RotaryEmbedding | ScaledRotary:
        config = self.config
        if is_scaled(config):
            return ScaledRotary(config, self.context.device)
        return RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling_factor is not None,
            rope_scaling_factor=config.rope_scaling_factor or 1.0,
            use_cpu_initialization=self.transformer_config.use_cpu_initialization,
            cp_group=self.context.groups.cp,
        )

    def _build_layer(self, index: int, chunk: int, seed: int) -> nn.Module:
        draw_part(self.context, seed, 2 + index)
        layer = build_module(
            layer_spec(self.config, index, self.transformer_config),
            config=self.transformer_config,
            layer_number=index + 1,
            pg_collection=self.context.groups,
        )
        for module in layer.modules():
            if isinstance(module, WideNorm):
                module.group = self.context.groups.tp
        if isinstance(layer.mlp, MoELayer):
            draw_experts(layer.mlp, self.context, seed, 2 + index)
            mark_experts(layer, self.context.topology)
        return _placed(layer, chunk)

    def _build_output(self) -> ColumnParallelLinear:
        return ColumnParallelLinear(
            self.config.hidden_size,
            self.padded_vocab_size,
            config=self.transformer_config,
            init_method=self.transformer_config.embedding_init_method,
            bias=self.config.output_bias,
            skip_weight_param_allocation=self.config.tie_embeddings,
            tp_group=self.context.groups.tp,
        )

    def _build_copy(self) -> nn.Parameter:
        shape = self.padded_vocab_size // self.context.topology.tp_size, self.config.hidden_size
        dtype, device = self.transformer_config.params_dtype, self.context.device
        copy = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        set_tensor_model_parallel_attributes(copy, is_parallel=True, dim=0, stride=1)
        copy.main_grad = _empty_gradient(copy)  # type: ignore[attr-defined]
        return copy

    @property
    def tied_copy(self) -> nn.Parameter | None:
        """A copy of the embedding's weight, where an output layer that is tied to it has none."""
        return self._tied_copy[0]

    @property
    def wants_tied(self) -> bool:
        """Whether this rank has an embedding with a tied weight, and is to train it."""
        if not self.config.tie_embeddings or self.embedding is None:
            return False
        trained: bool = self.embedding.word_embeddings.weight.requires_grad
        return trained

    def train_tied(self, trained: bool) -> None:
        """Let stages that share a weight exchange its gradient, or neither compute nor keep one.

        The operators must be made anew on both, by the same step.
        """
        self.trains_tied = trained
        copy = self.tied_copy
        if copy is None or copy.requires_grad is trained:
            return
        copy.requires_grad_(trained)
        if trained:
            copy.main_grad = _empty_gradient(copy)  # type: ignore[attr-defined]
        else:
            del copy.__dict__["main_grad"]

    def settle(self) -> None:
        """Take the layers as they are now, after a user has put modules of their own there.

        With pipeline parallelism such a module belongs to the chunk of the layer before it, and
        other stages than that chunk's forget it. All ranks must have put in the same.

        Raises:
            ValueError: a chunk has lost its last layer, or layers are not in the chunks that they
                were built for, in order and once each.
        """
        if self.context.topology.pp_size == 1:
            return
        check_order(self.layers, self.context.topology.pp_size)
        chunk = 0
        for index, layer in enumerate(self.layers):
            chunk = getattr(layer, "pipeline_chunk", chunk)
            here = is_here(chunk, self.context)
            self.layers[index] = _placed(layer, chunk) if here else Elsewhere(chunk)
        stage, placement = self.context.topology.pp_rank, self.context.placement
        for own in placement.held(stage):
            # The embedding and the head make chunks of their own.
            if own not in (0, placement.chunks - 1) and not self.own_layers(own):
                raise ValueError(
                    f"pipeline stage {stage} has no layer left in chunk {own}:"
                    " replace fewer layers in build_model, or give pipeline_split"
                )

    def named_among_all(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by the names that they have among those of all ranks.

        `named_parameters` counts the experts of each rank from 0. Here, as in checkpoints and in
        messages, an expert has its number among all experts of its layer, wherever it is: so the
        name means the same whatever `expert_parallel_size`. All other names are the same.
        """
        names = ExpertNames(self)
        for name, parameter in self.named_parameters():
            yield names.of_all(name), parameter

    def own_layers(self, chunk: int) -> list[tuple[int, nn.Module]]:
        """The layers of a chunk of this rank's stage, with their numbers in the model."""
        if self.context.topology.pp_size == 1:
            # One stage has all chunks; where they meet makes no difference.
            return list(enumerate(self.layers)) if chunk == 0 else []
        return [pair for pair in enumerate(self.layers) if self.chunk_of(pair[0]) == chunk]

    def chunk_of(self, layer: int) -> int:
        """The chunk of the pipeline that a layer is part of."""
        chunk = self.layers[layer].pipeline_chunk
        assert isinstance(chunk, int)
        return chunk

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunk of the pipeline that each layer is part of; one stage has a single one."""
        if self.context.topology.pp_size == 1:
            return (0,) * len(self.layers)
        return tuple(self.chunk_of(index) for index in range(len(self.layers)))

    @property
    def chunk_count(self) -> int:
        """How many chunks there are; some may have no layer."""
        return self.context.placement.chunks if self.context.topology.pp_size > 1 else 1

    @property
    def output_weight(self) -> nn.Parameter:
        """The weight [padded V / TP, H] of the output layer; the embedding's own when tied.

        Where that is on another stage, it is a copy, which is no parameter of the model.
        """
        if self.tied_copy is not None:
            return self.tied_copy
        assert self.output_layer is not None
        if self.config.tie_embeddings:
            assert self.embedding is not None
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, S, V], or with ``labels`` the loss of every token [B, S] in fp32.

        ``tokens`` [B, S]. ``labels`` [B, S] are the next tokens (already shifted); -100 is ignored.
        ``loss_mask`` [B, S] multiplies the losses. ``positions`` [B, S] are where tokens stand in
        their documents, if not where in their sample, and ``attention_mask`` [B, 1, S, S] is true
        where a token does not see another, if that is more than what comes later. Raises ValueError
        when S exceeds max_sequence_length or is not a multiple of tensor_parallel_size, and
        RuntimeError when this rank has only a pipeline stage's layers. Under autocast on the CPU it
        computes in that type, with copies of the weights.
        """
        if self.context.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            return self._in_autocast(tokens, labels, loss_mask, positions, attention_mask)
        if self.context.topology.cp_size > 1:
            raise RuntimeError(
                "this rank has only its pieces of each sequence: run them under DHellamStrategy,"
                " with batch_loss and batch_logits"
            )
        if self.context.topology.pp_size > 1:
            raise RuntimeError(
                "this rank has only its pipeline stage's layers: run them under DHellamStrategy,"
                " with batch_loss and batch_logits"
            )
        self._check_length(tokens.size(1))
        assert self.embedding is not None
        assert self.final_norm is not None and self.output_layer is not None
        with self.context.megatron():
            rotary = None if self.rotary is None else self.rotary(tokens.size(1))
            if rotary is not None and positions is not None:
                rotary = rotary[:, 0, 0][positions.t()].unsqueeze(2)
            hidden = self.embedding(tokens, self._positions(tokens, positions))
            with self._dropout_generator():
                for layer in self.layers:
                    if isinstance(layer, TransformerLayer):
                        hidden, _ = layer(
                            hidden, attention_mask=attention_mask, rotary_pos_emb=rotary
                        )
                    else:
                        hidden = self._of_users_block(layer, hidden)
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

    def _positions(self, tokens: Tensor, positions: Tensor | None) -> Tensor | None:
        """Where tokens [B, S] stand, if the embedding asks for it."""
        if self.config.position_embedding != "learned" or positions is not None:
            return positions
        return torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)

    def _in_autocast(self, *args: Tensor | None) -> Tensor:
        # Backward of Megatron's linear layers restores autocast of CUDA only: on the CPU it would
        # multiply gradients in bf16 by weights in fp32.
        dtype = torch.get_autocast_dtype("cpu")
        copies = {name: weight.to(dtype) for name, weight in self.named_parameters()}
        with torch.autocast("cpu", enabled=False):
            found: Tensor = torch.func.functional_call(self, copies, args)
        return found

    def _of_users_block(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states of this rank's tokens from those before the block."""
        if not self.transformer_config.sequence_parallel or is_token_wise(block):
            return block(hidden)
        group = self.context.groups.tp
        whole = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=False, group=group
        )
        with of_whole_sequences(block):
            return scatter_to_sequence_parallel_region(block(whole), group=group)

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
        tp_size = self.context.topology.tp_size
        if length % tp_size:
            raise ValueError(
                f"sequence length {length} is not a multiple of "
                f"tensor_parallel_size={tp_size}: every rank holds an equal share"
            )


def _placed(layer: nn.Module, chunk: int) -> nn.Module:
    layer.pipeline_chunk = chunk  # type: ignore[assignment]
    return layer


def _empty_gradient(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, device=parameter.device)
