"""Biases of linear layers, and models without rotary embedding, against autograd."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import (
    CPU,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    reduced,
    train,
)
from tests.models.llama import SMALL, relative_error
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

TOLERANCE = 1e-5
LLAMA = replace(SMALL, vocab_size=53, linear_bias=True)
GPT = replace(
    LLAMA, normalization="LayerNorm", activation="gelu", num_query_groups=4,
    position_embedding="none",
)  # fmt: skip
CONFIGS = {
    "swiglu": LLAMA,
    "gelu": replace(LLAMA, activation="gelu"),
    "qkv": replace(LLAMA, linear_bias=False, qkv_bias=True),
    "attention and output": replace(
        LLAMA, linear_bias=False, attention_bias=True, output_bias=True, normalization="LayerNorm"
    ),
    "none": replace(LLAMA, linear_bias=False, position_embedding="none"),
    "gpt": GPT,
}
FROZEN = ("nothing", "linear_qkv.bias", "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias",
          "linear_fc2.weight", "bias")  # fmt: skip
BIASES = ("linear_qkv.bias", "linear_proj.bias", "linear_fc1.bias", "linear_fc2.bias")


def filled(
    config: ModelConfig, context: ParallelContext, dtype: torch.dtype = torch.float32
) -> CausalLM:
    """A model in which no bias is zero, equal on every number of ranks."""
    model = CausalLM(config, context, dtype)
    generator = torch.Generator().manual_seed(3)
    ranks, rank = context.topology.tp_size, context.topology.tp_rank
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            split = getattr(parameter, "tensor_model_parallel", False)
            dim = parameter.partition_dim if split else 0
            shape = [*parameter.shape]
            shape[dim] *= ranks if split else 1
            if "word_embeddings" in name or "output_layer" in name:
                shape[0] = config.padded_vocab_size(2)  # which one rank pads less
            drawn = torch.randn(shape, generator=generator) * 0.2
            drawn += 1 if "norm.weight" in name else 0
            parameter.copy_(_share(drawn, parameter, name, config, rank, ranks))
    add_main_grads(model)
    return model


def _share(
    whole: Tensor, parameter: nn.Parameter, name: str, config: ModelConfig, rank: int, ranks: int
) -> Tensor:
    """This rank's part of a tensor, as Megatron-core splits it."""
    if "word_embeddings" in name or "output_layer" in name:
        return whole[rank * parameter.shape[0] :][: parameter.shape[0]]
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if "linear_fc1" in name and config.activation == "swiglu":
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    return whole.chunk(ranks, dim=parameter.partition_dim)[rank]


def freeze(model: CausalLM, names: Iterable[str]) -> None:
    for name, parameter in model.named_parameters():
        frozen = "layers" in name and any(name.endswith(one) for one in names)
        parameter.requires_grad_(not frozen)
    add_main_grads(model)


def by_autograd(
    model: CausalLM, batch: dict[str, Tensor], context: ParallelContext
) -> tuple[Tensor, dict[str, Tensor]]:
    with context.megatron():
        losses = model(batch["tokens"], batch["labels"])
        loss = losses.sum() / (batch["labels"] != -100).sum()
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), reduced(model, gradients)


def _errors(config: ModelConfig, frozen: str, context: ParallelContext) -> dict[str, float]:
    """How far the engine's loss and each gradient are from those of autograd."""
    model = filled(config, context)
    freeze(model, [frozen])
    batch = batch_of(config, 3, 16)
    loss, gradients = train(engine_of(lower(model), poison=True), model, pieces(batch, 3, context))
    gradients = reduced(model, gradients)
    expected_loss, expected = by_autograd(model, batch, context)
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], value) for name, value in expected.items()}
    errors["loss"] = (loss - expected_loss).abs().item() / expected_loss.item()
    errors["bits of the loss"] = loss.item()
    return errors


def _check(errors: dict[str, float]) -> float:
    loss = errors.pop("bits of the loss")
    assert max(errors.values()) <= TOLERANCE, errors
    return loss


@pytest.mark.parametrize("config", CONFIGS)
def test_against_autograd(config: str) -> None:
    errors = _errors(CONFIGS[config], "nothing", ParallelContext.single(CPU))
    biases = [name for name in errors if name.endswith(BIASES)]
    per_layer = {"qkv": 1, "none": 0, "attention and output": 2}.get(config, 4)
    assert ("output_layer.bias" in errors) == CONFIGS[config].output_bias
    assert len(biases) == per_layer * SMALL.num_layers
    _check(errors)


@pytest.mark.parametrize("frozen", FROZEN[1:])
def test_frozen_ones_against_autograd(frozen: str) -> None:
    _check(_errors(LLAMA, frozen, ParallelContext.single(CPU)))


def _dropped(context: ParallelContext, dtype: torch.dtype) -> dict[str, Any]:
    """A bias is dropped with what it is added to: in Megatron-core's order."""
    model = filled(replace(LLAMA, hidden_dropout=0.3), context, dtype)
    micro_batches = pieces(batch_of(LLAMA, 4, 16), 2, context)
    lowered = lower(model)
    expected = train(engine_of(lowered, builder=BUILDERS["sequential"]), model, micro_batches)
    for builder in (*BUILDERS.values(), *map(random_builder, range(5))):
        engine = engine_of(lowered, builder=builder, poison=True)
        assert differing(train(engine, model, micro_batches), expected) == []
    return {"loss": expected[0], **reduced(model, expected[1])}


def _on_rank(rank: int) -> dict[str, Any]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    found: dict[str, Any] = {name: _errors(c, "nothing", context) for name, c in CONFIGS.items()}
    found["frozen"] = [_errors(LLAMA, frozen, context) for frozen in FROZEN[1:]]
    found["plans"] = [_dropped(context, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found["same"] = all(
        _equal_on_ranks(outcome[name], context)
        for outcome in found.pop("plans")
        for name in outcome
        if name.endswith(("linear_proj.bias", "linear_fc2.bias"))
    )
    return found


def _equal_on_ranks(gradient: Tensor, context: ParallelContext) -> bool:
    both = [torch.empty_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient, group=context.groups.tp)
    return torch.equal(*both)


def test_two_tensor_ranks_against_autograd_and_one() -> None:
    alone = {n: _errors(c, "nothing", ParallelContext.single(CPU)) for n, c in CONFIGS.items()}
    for found in run_ranks(2, _on_rank):
        for name, errors in alone.items():
            assert abs(_check(found[name]) / errors["bits of the loss"] - 1) <= TOLERANCE
        for errors in found["frozen"]:
            _check(errors)
        assert found["same"], "a bias that every rank has must stay the same on every rank"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_plan_changes_a_model_with_biases_and_dropout(dtype: torch.dtype) -> None:
    _dropped(ParallelContext.single(CPU), dtype)


def test_a_bias_is_dropped_with_what_it_joins() -> None:
    context = ParallelContext.single(CPU)
    model = filled(replace(LLAMA, num_layers=1, hidden_dropout=0.5), context)
    layer = model.layers[0]
    with torch.no_grad():
        layer.self_attention.linear_proj.weight.zero_()
        layer.mlp.linear_fc2.weight.zero_()
    (piece,) = pieces(batch_of(LLAMA, 2, 8), 2, context)
    slots = dict(piece.slots) | {"x": torch.randn(8, 2, LLAMA.hidden_size)}
    with torch.no_grad():
        for operator in lower(model).layers[1].forward.operators:
            result = operator.run(*(slots[name] for name in operator.reads))
            values = result if len(operator.writes) > 1 else (result,)
            slots.update(zip(operator.writes, values, strict=True))
    added = slots["mid"] - slots["x"]
    bias = layer.self_attention.linear_proj.bias
    doubled = torch.isclose(added, 2 * bias, atol=1e-6)
    dropped = torch.isclose(added, torch.zeros(()), atol=1e-6)
    assert torch.all(doubled | dropped) and 0.3 < dropped.float().mean() < 0.7


def test_operators_of_biases() -> None:
    def names(config: ModelConfig) -> list[str]:
        model = filled(config, ParallelContext.single(CPU))
        return [o.name for o in lower(model).layers[1].backward.operators]

    with_biases, without = names(LLAMA), names(replace(LLAMA, linear_bias=False))
    assert [name for name in with_biases if name not in without] == [
        "fc2.bias.grad", "fc1.bias.grad", "proj.bias.grad", "qkv.bias.grad"
    ]  # fmt: skip
    assert [name for name in with_biases if name in without] == without


def test_without_rotary_embedding_heads_are_read_where_they_are() -> None:
    model = filled(GPT, ParallelContext.single(CPU))
    assert model.rotary is None
    layer = lower(model).layers[1]
    assert not [n for n in (*layer.forward.by_name, *layer.backward.by_name) if "rope" in n]
    assert layer.forward.by_name["attention"].reads == ("batch.documents", "qkv")
    assert layer.backward.by_name["attention.grad"].writes == ("d_qkv",)
    assert "qkv" in layer.saved and "rotated" not in layer.saved
