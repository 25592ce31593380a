"""Megatron-core's own model, layers and forward-backward function, as a side of a benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from lightning_dhellam.models import CausalLM
from lightning_dhellam.models.norm import RMSNorm
from lightning_dhellam.models.spec import llama_layer_spec

_THEIRS = {"final_norm.": "decoder.final_layernorm.", "layers.": "decoder.layers."}


class MegatronSide:
    """`GPTModel` with the weights of `model`, trained by `get_forward_backward_func()`.

    Megatron overlaps what it overlaps by itself: with sequence parallelism the second gather of a
    column-parallel input under the data gradient, and its scatter under the weight gradient.

    Args:
        model: whose configuration, groups and weights it takes.
        batch: `tokens` and `labels` [B, S].
        micro_batch: samples of each micro-batch.
    """

    def __init__(self, model: CausalLM, batch: dict[str, Tensor], micro_batch: int) -> None:
        self._context = model.context
        self._pieces = [
            (tokens, labels)
            for tokens, labels in zip(
                batch["tokens"].split(micro_batch),
                batch["labels"].split(micro_batch),
                strict=True,
            )
        ]
        self._micro_batch = micro_batch
        with self._context.megatron():
            self._model = _gpt_model(model)
            self._step = get_forward_backward_func()

    def step(self) -> Tensor:
        """Forward and backward of every micro-batch. Returns the mean loss."""
        for parameter in self._model.parameters():
            parameter.grad = None
        with self._context.megatron():
            parts: Sequence[dict[str, Tensor]] = self._step(
                forward_step_func=_forward,
                data_iterator=iter(self._pieces),
                model=self._model,
                num_microbatches=len(self._pieces),
                seq_length=self._pieces[0][0].shape[1],
                micro_batch_size=self._micro_batch,
            )
        return torch.stack([part["loss"] for part in parts]).mean()


def _gpt_model(model: CausalLM) -> GPTModel:
    shape = model.config
    specs = [llama_layer_spec(shape.ffn_hidden_size)] * shape.num_layers
    theirs = GPTModel(
        model.transformer_config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=shape.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=int(shape.rotary_base),
        share_embeddings_and_output_weights=shape.tie_embeddings,
        pg_collection=model.context.groups,
    )
    weights = {_their_name(name): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[name])
    return theirs


def _their_name(name: str) -> str:
    for ours, theirs in _THEIRS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _forward(pieces: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    tokens, labels = next(pieces)
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    return model(tokens, positions, None, labels=labels), partial(_mean)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    # A copy: the schedule divides the loss by the number of micro-batches in place.
    return loss, {"loss": loss.detach().clone()}
