"""Documents packed into samples are trained as if each were alone, fp32, in one process.

`test_context_parallel` has the same for several ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import CausalLM, export_llama
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import differing
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.plan.graphs import random_builder
from tests.runner.test_context_parallel import (
    BEGINS,
    LENGTH,
    POSITIONS,
    Case,
    documents_for_hugging_face,
    gradients_of,
    started,
)

PACKED = Case({}, packed=True)
DOCUMENTS = [
    (sample, slice(*ends))
    for sample, begins in enumerate(BEGINS)
    for ends in pairwise((*begins, LENGTH))
]


def _trained(case: Case, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    with started(case) as runner:
        return runner.train(batch, step=0), gradients_of(runner)


def _check(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert abs(found[0] - expected[0]) <= 1e-6 * expected[0]
    assert found[1].keys() == expected[1].keys()
    errors = {name: relative_error(found[1][name], expected[1][name]) for name in expected[1]}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("position_embedding", ["rope", "none"])
def test_documents_are_trained_as_if_alone(position_embedding: str) -> None:
    case = replace(PACKED, config=replace(SMALL, position_embedding=position_embedding))
    batch = case.batch
    counts = batch["loss_mask"] * (batch["labels"] != -100)
    losses: list[Tensor] = []
    summed: Counter[str] = Counter()
    alone = {name: batch[name] for name in ("tokens", "labels", "loss_mask")}
    with started(case) as runner:
        found = runner.train(batch, step=0), gradients_of(runner)
        evaluated, logits = runner.evaluate(batch), runner.predict(batch)
        for sample, tokens in DOCUMENTS:
            weight = counts[sample, tokens].sum()
            one = {name: value[sample : sample + 1, tokens] for name, value in alone.items()}
            losses.append(runner.train(one, step=0) * weight)
            for name, gradient in gradients_of(runner).items():
                summed[name] += gradient * weight  # type: ignore[assignment]
            of_one = runner.predict(one)
            assert relative_error(logits[sample, tokens], of_one[0]) <= 1e-5
    total = counts.sum()
    expected = sum(losses, torch.zeros(())) / total
    _check(found, (expected, {name: value / total for name, value in summed.items()}))
    assert abs(evaluated - expected) <= 1e-6 * expected


def test_loss_and_gradients_are_hugging_faces() -> None:
    reference, batch = hugging_face_llama(SMALL), PACKED.batch
    counts = batch["loss_mask"] * (batch["labels"] != -100)
    told = documents_for_hugging_face(POSITIONS)
    losses = token_losses(reference, batch["tokens"], batch["labels"], **told)
    loss = (losses * counts).sum() / counts.sum()
    loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    with started(PACKED) as runner:
        found = runner.train(batch), export_llama(runner.model, gradients_of(runner))
    _check(found, (loss.detach(), expected))


def test_positions_may_restart_where_attention_goes_on() -> None:
    """As with Megatron's reset_position_ids without reset_attention_mask."""
    reference, batch = hugging_face_llama(SMALL), PACKED.batch
    batch["document_ids"] = torch.zeros_like(POSITIONS)
    with started(PACKED) as runner:
        logits = runner.predict(batch)
        parted = runner.predict(PACKED.batch)
    expected = reference(
        batch["tokens"], position_ids=POSITIONS, attention_mask=torch.ones_like(POSITIONS)
    )
    assert relative_error(logits, expected.logits) <= 1e-5
    assert relative_error(logits, parted) > 0.1


def test_no_plan_changes_a_bit() -> None:
    case = replace(PACKED, config=replace(SMALL, hidden_dropout=0.1))
    with started(case, plan="sequential") as runner:
        expected = runner.train(case.batch, step=0), gradients_of(runner)
        for name, builder in BUILDERS.items():
            runner.use_plan(name, builder)
            assert not differing((runner.train(case.batch, step=0), gradients_of(runner)), expected)
        for seed in range(12):
            runner.use_plan(f"random-{seed}", random_builder(seed))
            assert not differing((runner.train(case.batch, step=0), gradients_of(runner)), expected)


def test_every_spelling_trains_the_same() -> None:
    batch = PACKED.batch
    expected = _trained(PACKED, batch)
    del batch["position_ids"]
    ends = [sample * LENGTH + tokens.stop for sample, tokens in DOCUMENTS]
    number = (POSITIONS == 0).cumsum(dim=1)
    seen = (number[:, :, None] == number[:, None]).tril()[:, None]
    for said in (
        {"cu_seqlens": torch.tensor([0, *ends]).int()},
        {"seq_idx": number},
        {"attention_mask": ~seen, "position_ids": POSITIONS},
    ):
        assert not differing(_trained(PACKED, {**batch, **said}), expected)


def test_the_models_own_forward_keeps_documents_apart() -> None:
    """What runs under Lightning's other strategies, by Megatron's modules and autograd."""
    with started(PACKED) as runner:
        expected, model = runner.predict(PACKED.batch), runner.model
    assert isinstance(model, CausalLM)
    number = (POSITIONS == 0).cumsum(dim=1)
    unseen = ~(number[:, :, None] == number[:, None]).tril()[:, None]
    with torch.no_grad():
        found = model(PACKED.batch["tokens"], positions=POSITIONS, attention_mask=unseen)
    assert relative_error(found, expected) <= 1e-5
