"""Mixtures of experts through the engine: loss, gradients and logits are Hugging Face's, fp32."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import export_huggingface, import_huggingface
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.llama import relative_error, token_losses
from tests.models.mixtures import MIXTURES, hugging_face_mixture
from tests.ranks import run_ranks

SAMPLES, LENGTH = 4, 16
FAMILIES = ("mixtral", "qwen3-moe", "phi-moe")
SIZES: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "experts": ({"expert_parallel_size": 2}, FAMILIES),
    "whole experts, tensor": (
        {
            "tensor_parallel_size": 2,
            "expert_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
        ("qwen3-moe", "phi-moe"),
    ),
    "tensor": ({"tensor_parallel_size": 2}, ("qwen3-moe", "phi-moe-long")),
    "experts, context": ({"context_parallel_size": 2, "expert_parallel_size": 2}, ("qwen3-moe",)),
}
"""Over two ranks, and of which models."""
Outcome = tuple[Tensor, dict[str, Tensor], Tensor]
"""Loss, gradients and logits of this rank's samples."""


def _outcome(name: str, sizes: dict[str, int], **options: Any) -> tuple[int, Outcome]:
    """The number of this rank among those with other samples, and what it finds."""
    config = MIXTURES[name]
    with Runner.create(config, CPU, micro_batch_size=1, **sizes, **options) as runner:
        import_huggingface(runner.model, hugging_face_mixture(config))
        optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
        runner.optimizer(optimizer, distributed_optimizer=False)
        topology = runner.context.topology
        batch = {
            key: value.chunk(topology.dp_size)[topology.dp_rank]
            for key, value in batch_of(config, SAMPLES, LENGTH).items()
        }
        loss = runner.mean(runner.train(batch))
        gradients = {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}
        found = export_huggingface(runner.model, gradients, in_memory=True)
        return topology.dp_rank, (loss, found, runner.predict(batch))


@cache
def _expected(name: str) -> Outcome:
    theirs, batch = hugging_face_mixture(MIXTURES[name]), batch_of(MIXTURES[name], SAMPLES, LENGTH)
    losses = token_losses(theirs, batch["tokens"], batch["labels"])
    loss = losses.sum() / (batch["labels"] != -100).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, theirs(batch["tokens"]).logits.detach()


def _check(name: str, found: Outcome, place: int, parts: int, where: str) -> None:
    loss, gradients, logits = found
    expected_loss, expected, expected_logits = _expected(name)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss, where
    assert gradients.keys() == expected.keys(), where
    errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
    assert max(errors.values()) <= 1e-5, (where, errors)
    own = expected_logits.chunk(parts)[place]
    assert logits.shape == own.shape and relative_error(logits, own) <= 1e-5, where


@pytest.mark.parametrize("name", MIXTURES)
def test_on_one_rank(name: str) -> None:
    place, found = _outcome(name, {}, plan="dhellam")
    _check(name, found, place, 1, name)


def _outcomes(rank: int) -> dict[str, dict[str, tuple[int, Outcome]]]:
    return {
        where: {name: _outcome(name, sizes, plan="interleaved") for name in names}
        for where, (sizes, names) in SIZES.items()
    }


def test_on_two_ranks() -> None:
    for outcomes in run_ranks(2, _outcomes):
        for where, of_models in outcomes.items():
            apart = "tensor" not in where and "context" not in where
            for name, (place, found) in of_models.items():
                _check(name, found, place, 2 if apart else 1, f"{name}, {where}")
