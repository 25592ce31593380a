"""Each kind of graph against autograd through Megatron's own modules, one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import Graph, GraphPair
from tests.engine.harness import CPU, add_main_grads, batch_of, pieces, prepared
from tests.models.llama import SMALL, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
CONFIG = replace(SMALL, vocab_size=53, num_layers=1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> CausalLM:
    return prepared(CONFIG, ParallelContext.single(CPU), request.param)


def _run(graph: Graph, slots: dict[str, Any]) -> None:
    with torch.no_grad():
        for operator in graph.operators:
            result = operator.run(*(slots[name] for name in operator.reads))
            values = result if len(operator.writes) > 1 else (result,) * len(operator.writes)
            slots.update(zip(operator.writes, values, strict=True))


def _both_ways(pair: GraphPair, slots: Mapping[str, Any]) -> dict[str, Any]:
    """Every slot of both directions. Backward sees what is saved and nothing else."""
    values = dict(slots)
    _run(pair.forward, values)
    allowed = {*pair.saved, *pair.backward.inputs}
    backward = {n: v for n, v in values.items() if n in allowed or n.startswith("batch.")}
    _run(pair.backward, backward)
    return values | backward


def _check(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    errors = {
        name: relative_error(actual[name].float(), value.float())
        for name, value in expected.items()
    }
    assert actual.keys() == expected.keys()
    assert max(errors.values()) <= TOLERANCE[dtype], errors


def _grads(module: torch.nn.Module, attribute: str) -> dict[str, Tensor]:
    return {name: getattr(weight, attribute) for name, weight in module.named_parameters()}


def _piece(model: CausalLM) -> MicroBatch:
    (piece,) = pieces(batch_of(CONFIG, 3, 17), 3, model.context)
    return piece


def _hidden(model: CausalLM, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(17, 3, CONFIG.hidden_size, generator=generator)
    return x.to(model.transformer_config.params_dtype)


def _by_autograd(model: CausalLM, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf, layer = x.clone().requires_grad_(), model.layers[0]
    with model.context.megatron():
        y, _ = layer(leaf, attention_mask=None, rotary_pos_emb=model.rotary(17))
        y.backward(dy)
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad} | _grads(layer, "grad")


def test_transformer_layer(model: CausalLM) -> None:
    x, dy = _hidden(model, 0), _hidden(model, 1)
    given = _piece(model).slots | {"x": x, "dy": dy}
    slots = _both_ways(lower(model).layers[1], given)
    actual = {"y": slots["y"], "dx": slots["dx"]} | _grads(model.layers[0], "main_grad")
    megatron = _by_autograd(model, x, dy)
    if x.dtype is torch.float32:
        _check(actual, megatron, x.dtype)
        return
    # The same bf16 numbers computed in fp32: we may not be much further off than Megatron is.
    exact = CausalLM(CONFIG, model.context)
    exact.load_state_dict(model.state_dict())
    truth = _by_autograd(exact, x.float(), dy.float())
    for name, value in truth.items():
        ours, theirs = (relative_error(d[name].float(), value) for d in (actual, megatron))
        assert ours <= max(1.5 * theirs, 4e-3), name
        assert theirs < 0.04, name


def test_embedding(model: CausalLM) -> None:
    dy, piece = _hidden(model, 1), _piece(model)
    slots = _both_ways(lower(model).layers[0], piece.slots | {"dy": dy})
    with model.context.megatron():
        y = model.embedding(piece.slots["batch.tokens"], None)
        y.backward(dy)
    assert torch.equal(slots["y"], y)
    _check(_grads(model.embedding, "main_grad"), _grads(model.embedding, "grad"), y.dtype)


def test_head(model: CausalLM) -> None:
    x, piece = _hidden(model, 0), _piece(model)
    slots = _both_ways(lower(model).layers[-1], piece.slots | {"x": x})
    leaf = x.clone().requires_grad_()
    normal = model.final_norm(leaf)
    logits = torch.nn.functional.linear(normal, model.output_weight)[..., : CONFIG.vocab_size]
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), piece.slots["batch.labels"].flatten(), reduction="none"
    )
    loss = (losses * piece.slots["batch.weights"].flatten()).sum()
    loss.backward()
    assert leaf.grad is not None and slots["loss"].shape == ()
    modules = torch.nn.ModuleList([model.final_norm, model.output_layer])
    expected = {"loss": loss.detach(), "dx": leaf.grad} | _grads(modules, "grad")
    actual = {"loss": slots["loss"], "dx": slots["dx"]} | _grads(modules, "main_grad")
    _check(actual, expected, x.dtype)
    assert torch.all(model.output_weight.main_grad[CONFIG.vocab_size :] == 0)


def test_logits(model: CausalLM) -> None:
    x = _hidden(model, 0)
    slots: dict[str, Any] = {"x": x}
    _run(lower(model).logits, slots)
    logits = torch.nn.functional.linear(model.final_norm(x), model.output_weight)
    expected = logits.transpose(0, 1)[..., : CONFIG.vocab_size].detach()
    assert slots["logits_whole"].is_contiguous()
    _check({"logits": slots["logits_whole"]}, {"logits": expected}, x.dtype)


def test_slots_have_the_bytes_that_their_graph_says(model: CausalLM) -> None:
    piece = _piece(model)
    for pair in lower(model).layers:
        slots = piece.slots | {"x": _hidden(model, 0), "dy": _hidden(model, 1)}
        values = _both_ways(pair, slots)
        for graph in (pair.forward, pair.backward):
            assert graph.bytes_per_token.keys() >= graph.written
            for name in graph.written:
                value = values[name]
                if isinstance(value, Tensor) and value.dim():
                    expected = graph.bytes_per_token[name] * piece.tokens
                    assert value.nbytes == expected, f"{graph}: {name}"


def test_residual_dropout_is_that_of_its_key() -> None:
    model = CausalLM(replace(CONFIG, hidden_dropout=0.5), ParallelContext.single(CPU))
    add_main_grads(model)
    pair = lower(model).layers[1]
    slots = _piece(model).slots | {"x": _hidden(model, 0)}
    slots |= {"dy": torch.ones_like(slots["x"])}
    first, again, other = (_both_ways(pair, slots | {"batch.whole_key": key}) for key in (3, 3, 4))
    assert torch.equal(first["y"], again["y"]) and torch.equal(first["dx"], again["dx"])
    assert not torch.equal(first["y"], other["y"])
    dropped = first["y"] == first["mid"]
    assert torch.equal(dropped, first["d_fc2"] == 0)
    assert 0.4 < dropped.float().mean() < 0.6
    # The two dropouts of a layer are not the same.
    assert not torch.equal(first["d_fc2"] == 0, first["d_proj"] == 0)
