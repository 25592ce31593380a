"""What Megatron-core's routers do that one would not expect, and what operators do instead."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    apply_router_token_dropping,
    compute_routing_scores_for_aux_loss,
    switch_load_balancing_loss_func,
)
from torch import Tensor

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
GROUPS = Routing(EXPERTS, 2, Scores.SIGMOID, groups=4, chosen_groups=1)


def _logits() -> Tensor:
    return torch.randn(SEQUENCE, BATCH, EXPERTS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "rule, bias",
    [(GROUPS, None), (Routing(EXPERTS, 2, Scores.SIGMOID), torch.linspace(-1, 1, EXPERTS))],
    ids=["groups", "bias"],
)
def test_the_loss_of_balance_counts_what_was_chosen(rule: Routing, bias: Tensor | None) -> None:
    """Megatron-core counts the experts of the largest scores, whatever was chosen."""
    leaf = _logits().requires_grad_()
    rows = leaf.flatten(0, 1)
    _, chosen = rule.forward(rows.detach(), bias)
    plain, scores = compute_routing_scores_for_aux_loss(rows, 2, "sigmoid")
    dispatched = torch.zeros_like(plain).scatter(1, chosen, True).sum(0)
    assert not torch.equal(dispatched, plain.sum(0)), "Megatron-core counts the same now"
    loss = switch_load_balancing_loss_func(scores, dispatched, TOKENS, 2, EXPERTS, 0.5)
    loss.backward()
    share = routing.counts(chosen, EXPERTS, 1) / (2 * TOKENS)
    values, found = routing.balance(rule.scores, _logits(), [share], [0.5], 1 / TOKENS)
    torch.testing.assert_close(0.5 * values[0], loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found, leaf.grad, rtol=0, atol=1e-5)


def test_a_padding_mask_says_what_is_left_out() -> None:
    """Its documentation says the opposite. Here labels say what padding is, and no mask does."""
    padding = torch.zeros(TOKENS, dtype=torch.bool)
    padding[:4] = True
    rows = _logits().flatten(0, 1)
    counted, _ = compute_routing_scores_for_aux_loss(rows, 2, "softmax", padding_mask=padding)
    assert not counted[:4].any() and (counted[4:].sum(1) == 2).all()


def test_dropping_by_position_keeps_the_first_tokens_and_megatron_does_not() -> None:
    most = 2048
    chosen = torch.zeros(2 * most, 1, dtype=torch.int64)
    weights = torch.ones(2 * most, 1)
    kept = routing.drop(weights, chosen, Routing(1, 1), 0.5, "position").flatten() == 0
    assert kept[:most].all() and not kept[most:].any()
    _, theirs = apply_router_token_dropping(
        weights, torch.ones_like(weights).bool(), 1, 0.5, drop_policy="position"
    )
    assert theirs.sum() == most and not torch.equal(theirs.flatten(), kept), (
        "Megatron-core drops the last tokens now"
    )


def test_a_scale_of_losses_is_the_first_callers_tensor() -> None:
    """So the operators have explicit weights, and never look at it."""
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    first = torch.ones(())
    MoEAuxLossAutoScaler.set_loss_scale(first)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(3.0))
    assert first == 3.0, "Megatron-core copies it now"
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


def test_jitter_acts_in_evaluation_so_it_is_refused() -> None:
    """Where a layer is lowered; see `test_router`."""
    module = make_router(router_config(moe_input_jitter_eps=0.5)).eval()
    x = torch.ones(1, 1, HIDDEN)
    with CONTEXT.megatron(), torch.no_grad():
        assert not torch.equal(module.apply_input_jitter(x), x), "Megatron-core does not now"
