"""One training step of a small model through the engine, and its gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine import Engine, Lanes, MicroBatch, cut, make_lanes
from lightning_dhellam.engine.lanes import CpuLanes
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.layers import Lowered
from lightning_dhellam.models import CausalLM, ModelConfig, import_llama
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS, Builder
from tests.models.llama import hugging_face_llama, random_batch

Batch = Mapping[str, Tensor]
CPU = torch.device("cpu")


class LoadingLanes(CpuLanes):
    """Loads kernels when they are launched first, as a GPU does."""

    loads = True


def prepared(
    config: ModelConfig, context: ParallelContext, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """The model with Hugging Face's random weights and an empty `main_grad` for each."""
    model = CausalLM(config, context, dtype)
    import_llama(model, hugging_face_llama(config))
    add_main_grads(model)
    return model


def add_main_grads(module: torch.nn.Module) -> None:
    """What Megatron's data parallelism does: an fp32 buffer for each gradient, none if frozen."""
    for parameter in module.parameters():
        parameter.__dict__.pop("main_grad", None)
        if parameter.requires_grad:
            parameter.main_grad = torch.zeros_like(  # type: ignore[attr-defined]
                parameter, dtype=torch.float32
            )


def batch_of(config: ModelConfig, samples: int = 3, length: int = 16) -> dict[str, Tensor]:
    """Random tokens and labels [B, S], some labels ignored."""
    tokens, labels = random_batch(config, max(samples, 2), length)
    return {"tokens": tokens[:samples], "labels": labels[:samples]}


def pieces(
    batch: Batch,
    size: int,
    context: ParallelContext,
    step: int = 0,
    everyone: Everyone | None = None,
) -> list[MicroBatch]:
    """Micro-batches of `size` samples, of this rank's batch or of that of `everyone`."""
    return cut(
        batch,
        size,
        device=context.device,
        seed=1,
        step=step,
        topology=context.topology,
        everyone=everyone,
    )


def engine_of(
    lowered: Lowered,
    device: torch.device = CPU,
    builder: Builder = BUILDERS["interleaved"],
    lanes: Lanes | None = None,
    poison: bool = False,
) -> Engine:
    """An engine for the whole model."""
    lanes = lanes or make_lanes(device, poison=poison)
    return Engine(lowered.layers, lanes, builder, lowered.logits, lowered.stage, ends=lowered.ends)


def train(
    engine: Engine, model: torch.nn.Module, micro_batches: list[MicroBatch]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every `main_grad` as this rank has it; the slots are all gone."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.main_grad.zero_()
    loss = engine.train(micro_batches).clone()
    ledger = engine.lanes.ledger
    assert (ledger.slots, ledger.bytes) == (0, 0), "slots outlive the step"
    return loss, {name: p.main_grad.clone() for name, p in trained.items()}


def reduced(model: CausalLM, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with those of weights that are not split summed over the tensor ranks.

    Each rank has seen its own tokens only. In training this happens after the step.
    """
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    for name, parameter in model.named_parameters():
        is_split = getattr(parameter, "tensor_model_parallel", False)
        if name in gradients and model.context.topology.tp_size > 1 and not is_split:
            dist.all_reduce(gradients[name], group=model.context.groups.tp)
    return gradients


def differing(
    actual: tuple[Tensor, Mapping[str, Tensor]], expected: tuple[Tensor, Mapping[str, Tensor]]
) -> list[str]:
    """Names of tensors that are not bitwise equal, NaN included."""
    assert actual[1].keys() == expected[1].keys()
    names = [name for name in actual[1] if not torch.equal(actual[1][name], expected[1][name])]
    return names if torch.equal(actual[0], expected[0]) else ["loss", *names]
