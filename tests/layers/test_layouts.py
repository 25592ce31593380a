"""How the slots of real layers lie, and that a wrong composition of them cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.layers.rules import of_stream
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Topology
from lightning_dhellam.plan import Collective, Graph, GraphPair, Lane, Layout, LayoutError
from lightning_dhellam.plan.layout import Rule
from tests.models.llama import SMALL
from tests.plan.real_graphs import context_of_rank_0, lowered

CONFIG = replace(SMALL, num_layers=1)
GPT = replace(CONFIG, normalization="LayerNorm", activation="gelu", hidden_dropout=0.1)
STREAM, WHOLE = "tp sharded(sequence)", "replicated"
HEADS, FFN, PARTIAL = "tp sharded(heads)", "tp sharded(ffn)", "tp partial"
VOCABULARY = "tp sharded(vocabulary)"


class Mixing(nn.Module):
    """A block that gets whole sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CONFIG.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0) * self.scale


class TokenWise(Mixing):
    """One that gets each rank's own tokens."""

    token_wise = True


def _model(ranks: int, config: Any = CONFIG, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    model = CausalLM(config, context_of_rank_0(ranks), dtype)
    model.layers.extend([Mixing().to(dtype), TokenWise().to(dtype)])
    return model


def _lies(pair: GraphPair) -> dict[str, str]:
    own = pair.forward.written | pair.backward.written
    return {slot: str(layout) for slot, layout in pair.lies.items() if slot in own}


def test_every_slot_of_a_model_on_two_tensor_ranks() -> None:
    embedding, transformer, mixing, token_wise, head = map(_lies, lower(_model(2)).layers)
    assert embedding == {"found": PARTIAL, "y": STREAM, "d_found": WHOLE}
    assert transformer == {
        "attention_norm": STREAM,
        "attention_rstd": STREAM,
        "attention_norm_full": WHOLE,
        "qkv": HEADS,
        "rotated": HEADS,
        "context": HEADS,
        "lse": HEADS,
        "attention_state": HEADS,
        "proj_partial": PARTIAL,
        "proj": STREAM,
        "mid": STREAM,
        "mlp_norm": STREAM,
        "mlp_rstd": STREAM,
        "mlp_norm_full": WHOLE,
        "gate_up": FFN,
        "act": FFN,
        "fc2_partial": PARTIAL,
        "fc2": STREAM,
        "y": STREAM,
        "d_fc2_full": WHOLE,
        "d_act": FFN,
        "d_gate_up": FFN,
        "d_mlp_norm_full": PARTIAL,
        "d_mlp_norm": STREAM,
        "mlp_norm_full_again": WHOLE,
        "d_mid": STREAM,
        "d_proj_full": WHOLE,
        "d_context": HEADS,
        "dq": HEADS,
        "dk": HEADS,
        "dv": HEADS,
        "d_qkv": HEADS,
        "d_attention_norm_full": PARTIAL,
        "d_attention_norm": STREAM,
        "attention_norm_full_again": WHOLE,
        "dx": STREAM,
    }
    assert mixing == {
        "x_full": WHOLE, "y": STREAM, "autograd": WHOLE, "dy_full": WHOLE, "dx": STREAM
    }  # fmt: skip
    assert token_wise == {"y": STREAM, "autograd": STREAM, "dx": STREAM}
    assert head == {
        "final_norm": STREAM,
        "final_rstd": STREAM,
        "final_norm_full": WHOLE,
        "logits": VOCABULARY,
        "statistics": VOCABULARY,
        "statistics_all": WHOLE,
        "loss": WHOLE,
        "lse": WHOLE,
        "d_logits": VOCABULARY,
        "d_final_norm_full": PARTIAL,
        "d_final_norm": STREAM,
        "final_norm_full_again": WHOLE,
        "dx": STREAM,
    }


def test_on_one_rank_everything_is_replicated() -> None:
    for pair in lower(_model(1)).layers:
        assert set(_lies(pair).values()) == {WHOLE}


def test_data_parallel_ranks_have_other_samples_and_partial_losses() -> None:
    model = _model(2)
    several = replace(model.context, topology=Topology(world_size=6, tp_size=2))
    model.context = several
    stream = f"{STREAM}, dp sharded(samples)"
    assert str(of_stream(several)) == stream
    embedding, transformer, *_, head = lower(model).layers
    assert embedding.lies["found"] == Layout.parse(f"{PARTIAL}, dp sharded(samples)")
    assert str(transformer.lies["mid"]) == stream
    assert str(head.lies["loss"]) == "dp partial" and str(head.lies["lse"]) == "dp sharded(samples)"


def test_where_ranks_share_sequences_blocks_work_token_by_token() -> None:
    model = CausalLM(CONFIG, context_of_rank_0(1, context_parallel_size=2))
    model.layers.append(TokenWise())
    *_, token_wise, head = lower(model).layers
    assert _lies(token_wise) == dict.fromkeys(("y", "autograd", "dx"), "cp sharded(sequence)")
    assert _lies(head)["loss"] == "cp partial"
    assert _lies(lower(model, loss=_custom_loss).layers[-1])["loss"] == "cp partial"
    model.layers.append(Mixing())
    with pytest.raises(
        ValueError,
        match=r"^layer 2, a Mixing, is given whole sequences, but with context_parallel_size=2 no"
        r" rank has one: set token_wise = True on its class if .*, or leave context_parallel_size",
    ):
        lower(model)


def _custom_loss(logits: Tensor, batch: Any) -> Tensor:
    return logits.sum()


def _custom() -> Lowered:
    return lower(_model(2), loss=_custom_loss)


MODELS: dict[str, Callable[[], Lowered]] = {
    "llama": lambda: lower(_model(2)),
    "llama in fp32, kept": lambda: lowered(2, CONFIG, recompute="none"),
    "gpt with dropout": lambda: lowered(2, GPT, torch.bfloat16),
    "gpt with biases": lambda: lowered(2, replace(GPT, linear_bias=True, qkv_bias=True)),
    "tied": lambda: lowered(2, replace(CONFIG, tie_embeddings=True)),
    "custom loss": _custom,
    "shared sequences": lambda: lowered(2, GPT, torch.bfloat16, context_parallel_size=3),
    "shared sequences, gathered": lambda: lowered(
        2, CONFIG, context_parallel_size=3, context_exchange="all_gather"
    ),
}


def _without(graph: Graph, name: str) -> Graph:
    """`graph` with an operator in place of a collective that moves nothing."""
    operators = (
        replace(o, lane=Lane.COMPUTE, rule=Rule()) if o.name == name else o for o in graph.operators
    )
    return replace(graph, operators=tuple(operators))


def _collectives(graph: Graph) -> list[str]:
    # What a ring hands on lies as what it is given does.
    still = Collective.EXCHANGE
    lanes = (Lane.TP, Lane.CP)
    return [o.name for o in graph.operators if o.lane in lanes and o.collective is not still]


@pytest.mark.parametrize("name", MODELS)
def test_no_collective_can_be_left_out(name: str) -> None:
    result = MODELS[name]()
    tried = 0
    for pair in result.layers:
        for collective in _collectives(pair.forward):
            with pytest.raises(LayoutError):
                GraphPair(
                    replace(pair.forward, **_without(pair.forward, collective)), pair.backward
                )
            tried += 1
        for collective in _collectives(pair.backward):
            with pytest.raises(LayoutError):
                GraphPair(pair.forward, _without(pair.backward, collective))
            tried += 1
    assert tried >= 12
    assert result.logits is not None and _collectives(result.logits)
    for collective in _collectives(result.logits):
        with pytest.raises(LayoutError):
            _without(result.logits, collective)


MARKS: dict[str, tuple[Callable[[CausalLM], nn.Parameter], bool, str]] = {
    "a split weight without its mark": (
        lambda model: model.layers[0].mlp.linear_fc1.weight,
        False,
        "transformer backward: fc1.wgrad leaves the gradient of its parameter 0 tp sharded(ffn),"
        " but that parameter is replicated, and its gradient is added up later",
    ),
    "a norm that is marked as split": (
        lambda model: model.layers[0].input_layernorm.weight,
        True,
        "transformer backward: attention.norm.grad leaves the gradient of its parameter 0 tp"
        " partial, but that parameter is sharded, and its gradient is not added up later",
    ),
    "an embedding without its mark": (
        lambda model: model.embedding.word_embeddings.weight,
        False,
        "embedding backward: embedding.wgrad leaves the gradient of its parameter 0 tp"
        " sharded(vocabulary), but that parameter is replicated, and its gradient is added up"
        " later",
    ),
}


@pytest.mark.parametrize("name", MARKS)
def test_a_parameter_lies_as_it_is_marked(name: str) -> None:
    parameter, mark, message = MARKS[name]
    model = _model(2)
    parameter(model).tensor_model_parallel = mark  # type: ignore[attr-defined]
    with pytest.raises(LayoutError) as error:
        lower(model)
    assert str(error.value) == message


def test_frozen_parameters_have_no_gradient_to_lie() -> None:
    model = _model(2).requires_grad_(False)
    for pair in lower(model).layers:
        assert pair.lies
