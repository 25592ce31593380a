"""Megatron-core's own model, layers and forward-backward function, as a side of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from lightning_dhellam.bench.megatron_model import cut_in_pieces, forward_step, gpt_model
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import ParallelContext


class MegatronSide:
    """`GPTModel` with the weights that ours starts from, run by `get_forward_backward_func()`.

    Megatron overlaps what it overlaps by itself: with sequence parallelism the second gather of a
    column-parallel input under the data gradient, and its scatter under the weight gradient.

    Args:
        shape: The model.
        context: The groups of this rank.
        batch: `tokens` and `labels` [B, S].
        micro_batch: Samples of each micro-batch.
    """

    def __init__(
        self,
        shape: ModelConfig,
        context: ParallelContext,
        batch: dict[str, Tensor],
        micro_batch: int,
    ) -> None:
        self._context = context
        self._pieces = cut_in_pieces(batch, micro_batch)
        self._micro_batch = micro_batch
        with context.megatron():
            self._model = gpt_model(shape, context)
            self._step = get_forward_backward_func()

    def step(self) -> Tensor:
        """Forward and backward of every micro-batch. Returns the mean loss, 0 where it is not."""
        self._model.zero_grad()
        with self._context.megatron():
            parts: Sequence[dict[str, Tensor]] = self._step(
                forward_step_func=forward_step,
                data_iterator=iter(self._pieces),
                model=self._model,
                num_microbatches=len(self._pieces),
                seq_length=self._pieces[0][0].shape[1],
                micro_batch_size=self._micro_batch,
            )
        losses = [part["loss"] for part in parts]
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def gradients(self) -> list[Tensor]:
        """The gradients of this rank's parameters."""
        return [p.grad for p in self._model.parameters() if p.grad is not None]
