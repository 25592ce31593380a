"""The mathematics of routers against Megatron-core's and transformers' routers under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_updated_expert_bias,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.phimoe.configuration_phimoe import PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from lightning_dhellam.layers import routing
from lightning_dhellam.layers.routing import Routing, Scores
from tests.layers.routers import (
    BATCH,
    CONTEXT,
    EXPERTS,
    HIDDEN,
    SEQUENCE,
    make_router,
    router_config,
)

TOKENS = SEQUENCE * BATCH
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def _logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(SEQUENCE, BATCH, EXPERTS, generator=generator)


def _bias(fields: Mapping[str, Any]) -> Tensor | None:
    return torch.linspace(-0.3, 0.3, EXPERTS) if fields.get(*list(BIASED)[1:]) else None


def _reference(
    config: TransformerConfig, d_probs: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's probabilities and map, [N, E], and the gradient by logits."""
    router = make_router(config)
    if bias is not None:
        router.expert_bias.copy_(bias)
    leaf = _logits().requires_grad_()
    with CONTEXT.megatron():
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
        probs, chosen = router.routing(leaf)
        (probs * d_probs).sum().backward()
    assert leaf.grad is not None
    return probs.detach(), chosen, leaf.grad.flatten(0, 1)


def _dense(values: Tensor, chosen: Tensor) -> Tensor:
    """[N, E] of what is there of the chosen experts; those beyond E were dropped."""
    whole = torch.zeros(len(values), EXPERTS + 1, dtype=values.dtype)
    return whole.scatter(1, chosen, values)[:, :EXPERTS]


COMBINATIONS = [
    *(
        {"moe_router_topk": k, "moe_router_pre_softmax": pre, "moe_router_topk_scaling_factor": f}
        for k, pre, f in product((2, 3), (False, True), (None, 2.5))
    ),
    {"moe_router_topk": 1, "moe_router_pre_softmax": True},
    *({"moe_router_topk": k, "moe_router_score_function": "sigmoid"} for k in (1, 4)),
    BIASED,
    {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
    {
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 16.0,
    },
    {
        **BIASED,
        "moe_router_topk": 4,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
    },
]


@pytest.mark.parametrize("fields", COMBINATIONS, ids=lambda f: "-".join(map(str, f.values())))
def test_weights_and_gradients_are_megatrons(fields: dict[str, Any]) -> None:
    config, bias, d_probs = router_config(**fields), _bias(fields), _logits(1).flatten(0, 1)
    probs, map_, grad = _reference(config, d_probs, bias)
    rule, logits = Routing.of(config), _logits().flatten(0, 1)
    weights, chosen = rule.forward(logits, bias)
    assert torch.equal(_dense(torch.ones_like(weights), chosen).bool(), map_)
    torch.testing.assert_close(_dense(weights, chosen), probs, rtol=0, atol=1e-6)
    d_logits = rule.backward(d_probs.gather(1, chosen), logits, chosen)
    torch.testing.assert_close(d_logits, grad, rtol=0, atol=1e-5)


def test_routing_in_fp64_is_megatrons() -> None:
    config = router_config(moe_router_topk=3, moe_router_pre_softmax=True)
    logits = _logits().double().requires_grad_()
    with CONTEXT.megatron():
        probs, _ = make_router(config).routing(logits)
        probs.square().sum().backward()
    assert logits.grad is not None
    rows = logits.detach().flatten(0, 1)
    weights, chosen = Routing.of(config).forward(rows)
    d_logits = Routing.of(config).backward(2 * weights, rows, chosen)
    assert weights.dtype is d_logits.dtype is torch.float64
    # Megatron-core takes this softmax in fp32 all the same.
    torch.testing.assert_close(_dense(weights, chosen), probs.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(d_logits, logits.grad.flatten(0, 1), rtol=0, atol=1e-6)


def _shape(kind: type, **fields: Any) -> Any:
    return kind(hidden_size=HIDDEN, num_attention_heads=1, num_key_value_heads=1, **fields)


def _published() -> list[tuple[torch.nn.Module, Routing]]:
    mixtral = _shape(MixtralConfig, num_local_experts=EXPERTS, num_experts_per_tok=2)
    qwen = [
        _shape(Qwen3MoeConfig, num_experts=EXPERTS, num_experts_per_tok=3, norm_topk_prob=norm)
        for norm in (True, False)
    ]
    phi = _shape(PhimoeConfig, num_local_experts=EXPERTS, num_experts_per_tok=2)
    deep = _shape(
        DeepseekV3Config,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    sigmoid = Routing(EXPERTS, 4, Scores.SIGMOID, factor=2.5, groups=4, chosen_groups=2)
    return [
        (MixtralTopKRouter(mixtral), Routing(EXPERTS, 2)),
        (Qwen3MoeTopKRouter(qwen[0]), Routing(EXPERTS, 3)),
        (Qwen3MoeTopKRouter(qwen[1]), Routing(EXPERTS, 3, over_all=True)),
        (
            PhimoeTopKRouter(phi),
            Routing(EXPERTS, 2, Scores.SPARSEMIXER, jitter=phi.router_jitter_noise),
        ),
        (DeepseekV3TopkRouter(deep), sigmoid),
    ]


@pytest.mark.parametrize("theirs, ours", _published(), ids=lambda x: type(x).__name__)
def test_weights_and_gradients_are_those_of_published_models(
    theirs: torch.nn.Module, ours: Routing
) -> None:
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    bias = getattr(theirs, "e_score_correction_bias", None)
    if bias is not None:
        bias.copy_(torch.linspace(-0.3, 0.3, EXPERTS))
    x = torch.randn(TOKENS, HIDDEN, generator=generator).requires_grad_()
    logits, weights, chosen = theirs.eval()(x)
    logits.retain_grad()
    d_weights = torch.randn(weights.shape, generator=generator)
    (weights * d_weights).sum().backward()
    mine, picked = ours.forward(logits.detach(), bias)
    assert torch.equal(picked.sort(-1).values, chosen.sort(-1).values)
    torch.testing.assert_close(
        _dense(mine, picked), _dense(weights.detach(), chosen), rtol=0, atol=1e-6
    )
    d_mine = _dense(d_weights, chosen).gather(1, picked)
    found = ours.backward(d_mine, logits.detach(), picked)
    torch.testing.assert_close(found, logits.grad, rtol=0, atol=1e-5)


def test_the_two_steps_of_sparse_mixing() -> None:
    logits = torch.tensor([[4.0, 3.99, 1.0, 3.0], [-1.0, -1.01, -5.0, -9.0], [2.0, 2.0, 2.0, 2.0]])
    weights, chosen = Routing(4, 2, Scores.SPARSEMIXER, jitter=0.01).forward(logits)
    # Of the first token the two best are within 2%, then the third is far; of the second the two
    # best are within 2% of the larger magnitude; of the third all are equal.
    near = 1 / (1 + torch.tensor(-0.01).exp())
    assert chosen[:2].tolist() == [[0, 1], [0, 1]] and len(set(chosen[2].tolist())) == 2
    expected = torch.tensor([[near, 1.0], [near, 1.0], [1 / 4, 1 / 3]])
    torch.testing.assert_close(weights, expected)


def test_few_experts_are_near_enough_to_share_in_sparsemixers_weight() -> None:
    """With a wide margin all share, as in a softmax; with none the best has all."""
    logits = _logits().flatten(0, 1)
    wide, _ = Routing(EXPERTS, 2, Scores.SPARSEMIXER, jitter=1e3).forward(logits)
    torch.testing.assert_close(wide[:, 0], logits.softmax(-1).max(-1).values)
    alone, chosen = Routing(EXPERTS, 2, Scores.SPARSEMIXER, jitter=0.0).forward(logits)
    assert torch.equal(alone, torch.ones_like(alone))
    assert torch.equal(chosen, logits.topk(2, dim=-1).indices)


def test_more_groups_than_experts_of_a_token_leave_no_expert_out() -> None:
    """Megatron-core takes the best `2 // 4` experts of a group, so that no group is better."""
    fields = {"moe_router_num_groups": 4, "moe_router_group_topk": 3}
    config = router_config(**fields)
    logits = _logits().flatten(0, 1)
    _, chosen = Routing.of(config).forward(logits)
    assert torch.equal(chosen, logits.topk(2, dim=-1).indices)
    _, theirs, _ = _reference(config, torch.ones(TOKENS, EXPERTS))
    best = torch.zeros_like(theirs).scatter(1, chosen, True)
    assert not torch.equal(theirs, best), "Megatron-core chooses among all experts now"


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "moe_router_num_groups=3"),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 4}, "moe_router_group_topk=4"),
        (
            {"moe_router_num_groups": 8, "moe_router_group_topk": 1, "moe_router_topk": 2},
            "moe_router_topk=2 is more than the 1",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(fields: dict[str, Any], text: str) -> None:
    config = router_config()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=text):
        Routing.of(config)


def test_dropping_by_weight_is_megatrons() -> None:
    config = router_config(moe_expert_capacity_factor=0.8, moe_token_drop_policy="probs")
    d_probs = _logits(1).flatten(0, 1)
    probs, map_, grad = _reference(config, d_probs)
    rule, logits = Routing.of(config), _logits().flatten(0, 1)
    weights, selected = rule.forward(logits)
    chosen = routing.drop(weights, selected, rule, 0.8, "probs")
    assert torch.equal(_dense(torch.ones_like(weights), chosen).bool(), map_)
    torch.testing.assert_close(_dense(weights, chosen), probs, rtol=0, atol=1e-6)
    d_weights = d_probs.gather(1, selected).masked_fill(chosen == EXPERTS, 0.0)
    found = rule.backward(d_weights, logits, selected)
    torch.testing.assert_close(found, grad, rtol=0, atol=1e-5)


def test_dropping_by_position_drops_the_last_tokens() -> None:
    """Megatron-core takes the largest of equal numbers instead, in no order."""
    chosen = torch.zeros(TOKENS, 1, dtype=torch.int64)
    weights = torch.rand(TOKENS, 1)
    assert routing.capacity(TOKENS, Routing(EXPERTS, 1), 1.1) == 5
    kept = routing.drop(weights, chosen, Routing(EXPERTS, 1), 1.1, "position")
    assert kept.flatten().tolist() == [0] * 5 + [EXPERTS] * (TOKENS - 5)


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.7, 1.0, 20.0])
def test_padding_takes_no_place_of_others(policy: str, factor: float) -> None:
    rule, logits = Routing(EXPERTS, 2), _logits().flatten(0, 1)
    weights, chosen = rule.forward(logits)
    padding = torch.arange(TOKENS) % 3 == 1
    found = routing.drop(weights, chosen, rule, factor, policy, padding)
    alone = routing.drop(weights[~padding], chosen[~padding], rule, factor, policy)
    assert torch.equal(found[~padding], alone) and (found[padding] == EXPERTS).all()
    assert (alone == EXPERTS).any() == (factor < 20)
    nothing = torch.zeros_like(padding)
    without = routing.drop(weights, chosen, rule, factor, policy)
    assert torch.equal(routing.drop(weights, chosen, rule, factor, policy, nothing), without)
    every = routing.drop(weights, chosen, rule, factor, policy, ~nothing)
    assert (every == EXPERTS).all()


def test_counts_are_by_sample() -> None:
    chosen = torch.tensor([[0, 1], [2, 3], [0, 2], [2, 3]])  # two positions of two samples
    assert routing.counts(chosen, 4, 2).tolist() == [[2, 1, 1, 0], [0, 0, 2, 2]]
    padding = torch.tensor([[False, False], [True, False]])
    assert routing.counts(chosen, 4, 2, padding).tolist() == [[1, 1, 0, 0], [0, 0, 2, 2]]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_z_loss_and_losses_of_balance_are_megatrons(scores: str) -> None:
    """Several at once, each with its coefficient, of one micro-batch that is the whole batch."""
    kinds, given = ["aux_loss", "seq_aux_loss", "global_aux_loss"], [0.3, 0.7, 0.2]
    config = router_config(
        moe_router_load_balancing_type=kinds,
        moe_aux_loss_coeff=given,
        moe_z_loss_coeff=0.05,
        moe_router_score_function=scores,
    )
    *_, grad = _reference(config, torch.zeros(TOKENS, EXPERTS))
    rule, logits = Routing.of(config), _logits()
    _, chosen = rule.forward(logits.flatten(0, 1))
    counts = routing.counts(chosen, EXPERTS, BATCH)
    whole = counts.sum(0, keepdim=True) / (2 * TOKENS)
    wanted = [whole, counts / (2 * SEQUENCE), whole]
    values, by_balance = routing.balance(rule.scores, logits, wanted, given, 1 / TOKENS)
    _, by_size = routing.shrink(logits, 1 / TOKENS)
    found = (by_balance + 0.05 * by_size).flatten(0, 1)
    torch.testing.assert_close(found, grad, rtol=0, atol=1e-5)
    normal = logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    expected = switch_load_balancing_loss_func(
        (logits.softmax(-1) if scores == "softmax" else normal).flatten(0, 1),
        counts.sum(0),
        TOKENS,
        2,
        EXPERTS,
        1.0,
    )
    torch.testing.assert_close(values[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("layers", "chosen"), [(3, 2), (5, 4)])
def test_a_coefficient_of_hugging_face_pulls_as_hard_times_k_over_the_layers(
    layers: int, chosen: int
) -> None:
    """As `aux_loss_coefficient` and the guide of mixtures of experts say."""
    rule, logits = Routing(EXPERTS, chosen), _logits()
    leaf, coefficient = logits.flatten(0, 1).requires_grad_(), 0.02
    others = [leaf.detach()] * (layers - 1)
    theirs = load_balancing_loss_func((leaf, *others), EXPERTS, chosen)
    (coefficient * theirs).backward()
    assert leaf.grad is not None and leaf.grad.any()
    counts = routing.counts(rule.forward(leaf.detach())[1], EXPERTS, BATCH).sum(0, keepdim=True)
    wanted, ours = [counts / counts.sum()], coefficient * chosen / layers
    (value,), grad = routing.balance(Scores.SOFTMAX, logits, wanted, [ours], 1 / TOKENS)
    torch.testing.assert_close(grad.flatten(0, 1), leaf.grad, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(value * chosen, theirs.detach(), rtol=1e-5, atol=0)


def test_the_bias_follows_the_load_as_megatrons_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *args, **options: None)
    monkeypatch.setattr(
        "megatron.core.parallel_state.get_tensor_and_data_parallel_group", lambda **options: None
    )
    bias, load = torch.linspace(-0.1, 0.1, EXPERTS), torch.arange(EXPERTS).float()
    expected = get_updated_expert_bias(load.clone(), bias, 0.01)
    assert torch.equal(routing.stepped_bias(bias, load, 0.01), expected)
