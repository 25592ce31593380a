"""A mixture of experts against Megatron-core's own under autograd: results and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import gelu, silu

from lightning_dhellam.kernels.choose import choose
from lightning_dhellam.layers.block import Setting
from lightning_dhellam.layers.dispatch import Dispatch
from lightning_dhellam.layers.expert_mlp import ExpertMlp
from lightning_dhellam.layers.experts import Experts
from lightning_dhellam.layers.writer import GraphWriter, Sizes
from lightning_dhellam.models.spec import linears
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.experts import mark_experts
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.plan import Graph, GraphPair, Lane, Strand
from lightning_dhellam.versions import QUIET_FIELDS
from tests.engine.harness import CPU, add_main_grads
from tests.models.llama import relative_error

HIDDEN, FFN, EXPERTS = 16, 24, 4
CONTEXT = ParallelContext.single(CPU)
BIASED = {"add_bias_linear": True}
SHARED = {"moe_shared_expert_intermediate_size": 20}


@dataclass(frozen=True)
class Case:
    """A layer and what goes through it.

    Attributes:
        fields: of its configuration.
        shape: of the tokens: sequence and batch.
        skewed: whether the first two experts get all tokens.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (8, 3)
    skewed: bool = False


CASES = {
    "plain": Case(),
    "a shared expert": Case(SHARED),
    "a shared expert with a gate": Case({**SHARED, "moe_shared_expert_gate": True}),
    "biases": Case(BIASED),
    "gelu, biases": Case({**BIASED, "gated_linear_unit": False, "activation_func": gelu}),
    "experts without tokens": Case({"num_moe_experts": 31}),
    "one token": Case(shape=(1, 1)),
    "two experts for all": Case(skewed=True),
    "one expert for all": Case({"moe_router_topk": 1, "moe_router_pre_softmax": True}, skewed=True),
    "no room for all": Case({"moe_expert_capacity_factor": 0.5}),
    "no room for all, skewed": Case({"moe_expert_capacity_factor": 0.5}, skewed=True),
    "one expert": Case(
        {"num_moe_experts": 1, "moe_router_topk": 1, "moe_router_pre_softmax": True}
    ),
}


def _config(fields: dict[str, Any]) -> TransformerConfig:
    wanted: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "ffn_hidden_size": FFN,
        "moe_ffn_hidden_size": FFN,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": silu,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "init_method_std": 0.3,
    }
    return TransformerConfig(**{**wanted, **QUIET_FIELDS, **fields})


def _layer(case: Case) -> MoELayer:
    experts, shared = (
        ModuleSpec(kind, submodules=linears()) for kind in (SequentialMLP, SharedExpertMLP)
    )
    with CONTEXT.megatron():
        torch.manual_seed(0)
        layer = MoELayer(
            _config(case.fields),
            MoESubmodules(experts=experts, shared_experts=shared),
            layer_number=1,
            pg_collection=CONTEXT.groups,
        )
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
        if case.skewed:
            # All tokens have a channel of 5.
            layer.router.weight[:, 0] = torch.tensor([3.0, 2.0, 0.0, 0.0])
    for expert in layer.experts.local_experts:
        # Otherwise Megatron-core cannot add the bias of an expert in place: autograd refuses it.
        expert.linear_fc2.explicit_expert_comm = True
    mark_experts(layer, CONTEXT.topology)
    add_main_grads(layer)
    return layer


def _graphs(layer: MoELayer, dtype: torch.dtype = torch.float32) -> GraphPair:
    """Both directions of a layer that is a mixture alone."""
    sizes = Sizes(CONTEXT, dtype, HIDDEN, 8)
    block = Experts.of(layer, Setting(sizes, choose(CPU, dtype), None, index=0))
    ahead = GraphWriter("mixture", Strand.FORWARD, sizes)
    y = block.forward(ahead, "x")
    back = GraphWriter("mixture", Strand.BACKWARD, sizes)
    dx = block.backward(back, "dy", "x")
    return GraphPair(ahead.graph({"x": sizes.shard}, (y,)), back.graph({"dy": sizes.shard}, (dx,)))


def _run(graph: Graph, slots: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        for operator in graph.operators:
            result = operator.run(*(slots[name] for name in operator.reads))
            values = result if len(operator.writes) > 1 else (result,) * len(operator.writes)
            slots.update(zip(operator.writes, values, strict=True))
    found: Tensor = slots[graph.outputs[0]]
    return found


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(*case.shape, HIDDEN, generator=generator) for _ in range(2))
    x[..., 0] = 5.0 if case.skewed else x[..., 0]
    return x, dy


def _ours(pair: GraphPair, layer: MoELayer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    tokens = x.shape[0] * x.shape[1]
    weights = torch.full(x.shape[:2], 1 / tokens)
    slots: dict[str, Any] = {"x": x, "batch.weights": weights, "batch.tally": Tally()}
    slots |= {"batch.padding": None, "batch.token_share": 1 / tokens}
    y = _run(pair.forward, slots)
    saved = {n: v for n, v in slots.items() if n in pair.saved or n.startswith("batch.")}
    dx = _run(pair.backward, saved | {"dy": dy})
    return {"y": y, "dx": dx} | {n: p.main_grad.clone() for n, p in layer.named_parameters()}


def _megatrons(layer: MoELayer, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    with CONTEXT.megatron():
        y, bias = layer(leaf)
        y.backward(dy)
    assert bias is None and leaf.grad is not None
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in layer.named_parameters()
    }
    return {"y": y.detach(), "dx": leaf.grad} | grads


def _error(found: Tensor, expected: Tensor) -> float:
    """Relative, or absolute of what is all zero."""
    if not expected.any():
        return float(found.abs().max())
    return relative_error(found, expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_and_gradients_are_megatrons(case: Case) -> None:
    layer = _layer(case)
    x, dy = _inputs(case)
    for parameter in layer.parameters():
        # What an expert without tokens leaves there would count.
        parameter.main_grad.fill_(torch.nan)
        parameter.main_grad_is_old = True
    found = _ours(_graphs(layer), layer, x, dy)
    expected = _megatrons(layer, x, dy)
    errors = {name: _error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, errors
    assert all(tensor.isfinite().all() for tensor in found.values())


def test_gradients_of_several_micro_batches_add_up() -> None:
    case = Case(SHARED)
    layer = _layer(case)
    pair, (x, dy) = _graphs(layer), _inputs(case)
    once = _ours(pair, layer, x, dy)
    twice = _ours(pair, layer, x, dy)
    for name, _ in layer.named_parameters():
        assert _error(twice[name], 2 * once[name]) <= 1e-6, name


def test_some_experts_or_all_may_be_frozen() -> None:
    layer = _layer(Case(BIASED))
    x, dy = _inputs(Case())
    expected = _megatrons(layer, x, dy)
    layer.experts.local_experts[1].requires_grad_(False)
    add_main_grads(layer)
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    for parameter in layer.experts.local_experts[1].parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    found = _ours(_graphs(layer), layer, x, dy)
    for name, gradient in found.items():
        wanted = torch.zeros_like(gradient) if name in frozen else expected[name]
        assert _error(gradient, wanted) <= 1e-5, name
    layer.experts.requires_grad_(False)
    names = {operator.name for operator in _graphs(layer).backward.operators}
    assert not names & {"experts.fc1.wgrad", "experts.fc2.wgrad", "experts.fc1.bias.grad"}


def test_biases_of_experts_that_ranks_share_are_refused_by_name() -> None:
    experts = _layer(Case(BIASED)).experts.local_experts
    sizes, kernels = Sizes(CONTEXT, torch.float32, HIDDEN, 8), choose(CPU, torch.float32)
    setting = Setting(sizes, kernels, None, index=3)
    split = Dispatch(EXPERTS, 2, HIDDEN, shared=True, kernels=kernels, ranks=1, rank=0)
    with pytest.raises(ValueError, match=r"layer 3: .*use expert_tensor_parallel_size=1"):
        ExpertMlp.of(experts, setting, split)
    assert ExpertMlp.of(experts, setting, replace(split, shared=False)).fc2_bias


def test_in_bf16_it_is_about_as_far_from_the_truth_as_megatron() -> None:
    case = Case(SHARED)
    layer, (x, dy) = _layer(case), _inputs(case)
    truth = _megatrons(layer, x, dy)
    layer.zero_grad()
    layer.bfloat16()
    add_main_grads(layer)
    half = layer, x.bfloat16(), dy.bfloat16()
    found, megatrons = _ours(_graphs(layer, torch.bfloat16), *half), _megatrons(*half)
    for name, value in truth.items():
        ours, theirs = (relative_error(d[name].float(), value) for d in (found, megatrons))
        assert ours <= max(1.5 * theirs, 1e-2), (name, ours, theirs)


def test_where_each_rank_has_all_experts_nothing_is_exchanged_and_no_host_waits() -> None:
    pair = _graphs(_layer(CASES["plain"]))
    operators = (*pair.forward.operators, *pair.backward.operators)
    assert {operator.lane for operator in operators} == {Lane.COMPUTE}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input=True"),
        (
            {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
            "moe_pad_expert_input_to_capacity=True",
        ),
        ({"activation_func": gelu}, "gated_linear_unit=True with activation_func=gelu"),
    ],
)
def test_what_is_not_lowered_is_refused_by_name(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _graphs(_layer(Case(fields)))


def test_experts_of_another_class_are_refused() -> None:
    layer = _layer(Case())
    layer.experts = torch.nn.ModuleList()
    with pytest.raises(ValueError, match=r"its experts is a ModuleList.*SequentialMLP"):
        _graphs(layer)


@pytest.mark.parametrize("name", ["GroupedMLP", "TEGroupedMLP"])
def test_grouped_experts_of_a_library_are_refused_with_the_remedy(name: str) -> None:
    layer = _layer(Case())
    # Neither can be built without its library.
    layer.experts = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=rf"experts are a {name}.*moe_grouped_gemm=False"):
        _graphs(layer)


HOW = {
    "moe_enable_deepep": True,
    "moe_flex_dispatcher_backend": "hybridep",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "moe_router_fusion": True,
    "moe_shared_expert_overlap": True,
    "moe_token_dispatcher_type": "flex",
}
"""Settings of Megatron-core that say how it computes or sends what a layer is."""


def test_settings_of_how_megatron_computes_change_nothing() -> None:
    layer, (x, dy) = _layer(CASES["a shared expert"]), _inputs(CASES["a shared expert"])
    plain = _graphs(layer)
    expected = _ours(plain, layer, x, dy)
    for name, value in HOW.items():
        assert getattr(layer.config, name) != value
        setattr(layer.config, name, value)  # some want a library when they are given
    add_main_grads(layer)
    other = _graphs(layer)
    assert [str(o) for o in other.forward.operators] == [str(o) for o in plain.forward.operators]
    found = _ours(other, layer, x, dy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
