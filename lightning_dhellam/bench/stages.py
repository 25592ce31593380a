"""The sides of the pipeline benchmark, as one process of the pipeline runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from lightning_dhellam.bench.pipeline import Settings
from lightning_dhellam.engine import Engine, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.models.norm import RMSNorm
from lightning_dhellam.models.spec import llama_layer_spec
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import builder

_CPU = torch.device("cpu")
_WARM_UP = 1
_OURS = {"final_norm.": "decoder.final_layernorm.", "layers.": "decoder.layers."}


class Side(NamedTuple):
    """One way to run a step.

    Attributes:
        step: forward and backward from cleared gradients; the loss, 0 on a stage without it.
        gradients: those of this rank's parameters.
    """

    step: Callable[[], Tensor]
    gradients: Callable[[], list[Tensor]]


def outcomes(settings: Settings) -> dict[str, dict[str, Any]]:
    """Times, loss and gradient norm of every side."""
    context = ParallelContext.create(_CPU, pipeline_parallel_size=settings.stages)
    with context.megatron():
        sides = {
            "folded, two strands": _folded(settings, context, "interleaved"),
            "folded, sequential": _folded(settings, context, "sequential"),
            "Megatron-core 1F1B": _one_f_one_b(settings, context),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses = {}
        for _ in range(_WARM_UP + settings.steps):
            # In turn, so that what else the machine does meets all sides alike.
            for name, side in sides.items():
                taken, losses[name] = _timed(side)
                seconds[name].append(taken)
    context.destroy()
    return {
        name: {"seconds": seconds[name][_WARM_UP:], **_sums(losses[name], side.gradients())}
        for name, side in sides.items()
    }


def _timed(side: Side) -> tuple[float, Tensor]:
    dist.barrier()
    begin = time.perf_counter()
    loss = side.step()
    dist.barrier()
    return time.perf_counter() - begin, loss


def _sums(loss: Tensor, gradients: list[Tensor]) -> dict[str, float]:
    """Loss and gradient norm of the whole model."""
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    total = torch.stack([loss.reshape(()), square])
    dist.all_reduce(total)
    return {"loss": total[0].item(), "grad norm": total[1].sqrt().item()}


def _batch(settings: Settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = (settings.micro_batches, settings.length + 1)
    tokens = torch.randint(settings.config.vocab_size, size, generator=generator)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def _folded(settings: Settings, context: ParallelContext, plan: str) -> Side:
    model = CausalLM(settings.config, context)
    grads = []
    for parameter in model.parameters():
        grads.append(torch.zeros_like(parameter))
        parameter.main_grad = grads[-1]  # type: ignore[attr-defined]
    lowered = lower(model)
    engine = Engine(lowered.layers, make_lanes(_CPU), builder(plan), stage=lowered.stage)

    def step() -> Tensor:
        for grad in grads:
            grad.zero_()
        return engine.train(cut(_batch(settings), 1, device=_CPU, seed=1, step=0, rank=0))

    return Side(step, lambda: grads)


def _one_f_one_b(settings: Settings, context: ParallelContext) -> Side:
    model = _their_stage(settings, context)

    def step() -> Tensor:
        model.zero_grad()
        parts = forward_backward_pipelining_without_interleaving(
            forward_step_func=_forward,
            data_iterator=iter(_rows(_batch(settings))),
            model=model,
            num_microbatches=settings.micro_batches,
            seq_length=settings.length,
            micro_batch_size=1,
        )
        losses = [part["loss"] for part in parts]
        return torch.stack(losses).mean() if losses else torch.zeros(())

    return Side(step, lambda: [p.grad for p in model.parameters() if p.grad is not None])


def _their_stage(settings: Settings, context: ParallelContext) -> GPTModel:
    """Megatron's GPTModel of this rank, with the weights that ours starts from."""
    shape, stages = settings.config, settings.stages
    config = shape.transformer_config(context)
    config.pipeline_model_parallel_size = stages
    config.pipeline_dtype = torch.float32
    each = shape.num_layers // stages
    theirs = GPTModel(
        config,
        TransformerBlockSubmodules(
            layer_specs=[llama_layer_spec(shape.ffn_hidden_size)] * each, layer_norm=RMSNorm
        ),
        vocab_size=shape.padded_vocab_size(1),
        max_sequence_length=shape.max_sequence_length,
        pre_process=context.pp_rank == 0,
        post_process=context.pp_rank == stages - 1,
        position_embedding_type="rope",
        rotary_base=int(shape.rotary_base),
        share_embeddings_and_output_weights=False,
        pg_collection=context.groups,
    )
    whole = CausalLM(shape, ParallelContext.single(_CPU))
    weights = {_their_name(name): p for name, p in whole.named_parameters()}
    first = each * context.pp_rank
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(weights[_in_the_whole(name, first)])
    return theirs


def _their_name(name: str) -> str:
    for ours, theirs in _OURS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _in_the_whole(name: str, first: int) -> str:
    """Megatron numbers the layers of a stage from 0."""
    prefix = _OURS["layers."]
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{first + int(number)}.{rest}"


def _rows(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(batch["tokens"].split(1), batch["labels"].split(1), strict=True))


def _forward(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    tokens, labels = next(batches)
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    return model(tokens, positions, None, labels=labels), partial(_mean)


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    # A copy: the schedule divides the loss by the number of micro-batches in place.
    return loss, {"loss": loss.detach().clone()}
