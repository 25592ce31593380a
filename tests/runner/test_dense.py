"""Dense families through the engine: loss, gradients and logits are Hugging Face's, fp32."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import export_huggingface, import_huggingface
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.dense import DENSE, hugging_face_dense
from tests.models.llama import relative_error, token_losses
from tests.ranks import run_ranks

SAMPLES, LENGTH = 4, 24
SIZES = ({"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"context_parallel_size": 2})
"""Over two ranks."""
Outcome = tuple[Tensor, dict[str, Tensor], Tensor | None]
"""Loss, gradients, and logits on the stage that has them."""


def _outcome(name: str, sizes: dict[str, int], **options: Any) -> tuple[Outcome, list[str]]:
    """What this rank finds, and names of tensors that come back otherwise than they went in."""
    config = DENSE[name]
    theirs = hugging_face_dense(config)
    with Runner.create(config, CPU, micro_batch_size=2, **sizes, **options) as runner:
        import_huggingface(runner.model, theirs)
        exported, state = export_huggingface(runner.model), theirs.state_dict()
        changed = [n for n, tensor in exported.items() if not torch.equal(tensor, state[n])]
        optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
        runner.optimizer(optimizer, distributed_optimizer=False)
        batch = batch_of(config, SAMPLES, LENGTH)
        loss = runner.mean(runner.train(batch))
        gradients = {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}
        found = export_huggingface(runner.model, gradients)
        return (loss, found, runner.predict(batch)), changed


@cache
def _expected(name: str) -> Outcome:
    theirs, batch = hugging_face_dense(DENSE[name]), batch_of(DENSE[name], SAMPLES, LENGTH)
    losses = token_losses(theirs, batch["tokens"], batch["labels"])
    loss = losses.sum() / (batch["labels"] != -100).sum()
    loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, theirs(batch["tokens"]).logits.detach()


def _check(name: str, found: tuple[Outcome, list[str]], where: str) -> None:
    (loss, gradients, logits), changed = found
    expected_loss, expected, expected_logits = _expected(name)
    assert expected_logits is not None and not changed, (where, changed)
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss, where
    assert gradients.keys() == expected.keys(), where
    errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
    assert max(errors.values()) <= 1e-5, (where, errors)
    assert logits is not None and relative_error(logits, expected_logits) <= 1e-5, where


@pytest.mark.parametrize("name", DENSE)
def test_on_one_rank(name: str) -> None:
    _check(name, _outcome(name, {}, plan="dhellam"), name)


def _outcomes(rank: int) -> dict[str, tuple[Outcome, list[str]]]:
    return {
        f"{name} {sizes}": _outcome(name, sizes, plan="interleaved")
        for sizes in SIZES
        for name in DENSE
    }


def test_on_two_ranks() -> None:
    for outcomes in run_ranks(2, _outcomes):
        for where, found in outcomes.items():
            _check(where.split()[0], found, where)
