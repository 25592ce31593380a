"""Mixtures of experts train under Lightning's ordinary strategies as under ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_dhellam import LanguageModel
from tests.ranks import run_ranks
from tests.strategy.runs import GLOBAL_BATCH, Losses, Model, join, loader, make_trainer

MIXTURES: dict[str, dict[str, Any]] = {
    "shared": {
        "expert_ffn_hidden_size": 24,
        "shared_expert_ffn_hidden_size": 16,
        "aux_loss_coefficient": 0.02,
        "z_loss_coefficient": 0.001,
    },
    "sigmoid": {
        "router_scores": "sigmoid",
        "router_scaling_factor": 2.5,
        "aux_loss": "seq_aux_loss",
        "aux_loss_coefficient": 0.02,
    },
    "two-step": {"router_scores": "sparsemixer", "router_jitter": 0.2},
}
OURS = {"micro_batch_size": GLOBAL_BATCH}


def _fit(strategy: Any, changes: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    losses, module = Losses(), Model(num_experts=4, **changes)
    make_trainer(strategy, [losses], max_steps=4).fit(module, loader(strategy))
    return losses.values, {n: p.detach() for n, p in module.named_parameters()}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_plain_autograd_trains_experts_as_dhellam_does(mixture: str) -> None:
    losses, weights = _fit("auto", MIXTURES[mixture])
    expected, wanted = _fit(OURS, MIXTURES[mixture])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(weights, wanted, rtol=1e-3, atol=1e-4)


def _under_ddp(rank: int) -> list[float]:
    join(rank, 2)
    losses = Losses()
    trainer = make_trainer("ddp", [losses], max_steps=2, use_distributed_sampler=False)
    trainer.fit(LanguageModel("moe-tiny", {"num_layers": 2}), loader("ddp"))
    return losses.values


def test_a_preset_trains_under_ddp() -> None:
    for losses in run_ranks(2, _under_ddp):
        assert len(losses) == 2 and losses[1] < losses[0]
