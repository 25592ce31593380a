"""The loss trajectory against Megatron-core's own model, schedule, DDP and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from lightning_dhellam.models import CausalLM
from lightning_dhellam.models.norm import RMSNorm
from lightning_dhellam.models.spec import llama_layer_spec
from lightning_dhellam.parallel import ParallelContext
from tests.ranks import run_ranks
from tests.strategy.runs import GLOBAL_BATCH, LENGTH, SHAPE, Model, Sequences, join, train

STEPS, MICRO_BATCHES, LEARNING_RATE, CLIP = 6, 4, 0.02, 0.5
BETAS, EPSILON, DECAY = (0.9, 0.95), 1e-8, 0.1
OURS = {"final_norm.": "decoder.final_layernorm.", "layers.": "decoder.layers."}


class Decayed(Model):
    """Megatron's defaults: matrices decay, vectors do not."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": DECAY},
            {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)


def _their_name(name: str) -> str:
    for ours, theirs in OURS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _their_model(context: ParallelContext) -> GPTModel:
    """Megatron's GPTModel with the weights that ours starts from."""
    config = SHAPE.transformer_config(context)
    specs = [llama_layer_spec(SHAPE.ffn_hidden_size)] * SHAPE.num_layers
    theirs = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
        vocab_size=SHAPE.vocab_size,
        max_sequence_length=SHAPE.max_sequence_length,
        position_embedding_type="rope",
        rotary_base=int(SHAPE.rotary_base),
        share_embeddings_and_output_weights=False,
        pg_collection=context.groups,
    )
    weights = {_their_name(name): p for name, p in CausalLM(SHAPE, context).named_parameters()}
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[name])
    return theirs


def _forward(batches: Iterator[Tensor], model: Any) -> Any:
    tokens = next(batches)
    positions = torch.arange(LENGTH).unsqueeze(0)
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    return losses, partial(_mean)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    # A copy: the schedule divides the loss by the number of micro-batches in place.
    return loss, {"loss": loss.detach().clone()}


def _train_theirs(context: ParallelContext) -> list[float]:
    with context.megatron():
        model = _their_model(context)
        ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            model,
            pg_collection=context.groups,
        )
        model.config.finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=context.groups
        )
        settings = OptimizerConfig(
            lr=LEARNING_RATE,
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_eps=EPSILON,
            clip_grad=CLIP,
        )
        optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False)
        for group in optimizer.param_groups:  # as Megatron's scheduler does in every step
            group["lr"], group["weight_decay"] = LEARNING_RATE, DECAY * group["wd_mult"]
        data = Sequences(STEPS * GLOBAL_BATCH).tokens
        losses = []
        for batch in data.split(GLOBAL_BATCH):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            parts = forward_backward_no_pipelining(
                forward_step_func=_forward,
                data_iterator=iter(batch.chunk(MICRO_BATCHES)),
                model=ddp,
                num_microbatches=MICRO_BATCHES,
                seq_length=LENGTH,
                micro_batch_size=GLOBAL_BATCH // MICRO_BATCHES,
            )
            optimizer.step()
            losses.append(torch.stack([part["loss"] for part in parts]).mean().item())
        return losses


def _train_both(rank: int, tensor_parallel_size: int) -> tuple[list[float], list[float]]:
    join(rank, tensor_parallel_size)
    strategy = {
        "tensor_parallel_size": tensor_parallel_size,
        "micro_batch_size": GLOBAL_BATCH // MICRO_BATCHES,
    }
    ours = train(strategy, Decayed(), max_steps=STEPS, gradient_clip_val=CLIP)
    context = ParallelContext.create(torch.device("cpu"), tensor_parallel_size=tensor_parallel_size)
    theirs = _train_theirs(context)
    context.destroy()
    return ours, theirs


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_loss_trajectory_is_megatrons(tensor_parallel_size: int) -> None:
    for ours, theirs in run_ranks(tensor_parallel_size, _train_both, tensor_parallel_size):
        assert len(set(theirs)) == STEPS and min(theirs) < theirs[0] - 0.1
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
