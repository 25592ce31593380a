"""Loss and every gradient of the engine against transformers' Llama, fp32."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_dhellam.layers import lower
from lightning_dhellam.models import ModelConfig, export_llama
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU, batch_of, engine_of, pieces, prepared, reduced, train
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.ranks import run_ranks


class Case(NamedTuple):
    """A model, and how a batch of five sequences is cut."""

    config: ModelConfig
    size: int = 2
    masked: bool = False


CASES = {
    "grouped-queries": Case(SMALL),
    "one-micro-batch": Case(SMALL, size=5),
    "one-sample-each": Case(SMALL, size=1),
    "loss-mask": Case(SMALL, masked=True),
    "one-group-per-head": Case(replace(SMALL, num_query_groups=4)),
    "tied": Case(replace(SMALL, tie_embeddings=True)),
    "odd-vocabulary": Case(replace(SMALL, vocab_size=53)),
    # With TP 2 the second rank holds nothing but padding.
    "tiny-vocabulary-tied": Case(replace(SMALL, vocab_size=7, tie_embeddings=True)),
    "scaled-rope-wide-heads": Case(
        replace(SMALL, head_dim=16, rope_scaling_factor=8.0, num_layers=3)
    ),
}
Outcome = tuple[Tensor, dict[str, Tensor], Tensor]


def _batch(case: Case) -> dict[str, Tensor]:
    batch = batch_of(case.config, samples=5, length=16)
    if case.masked:
        generator = torch.Generator().manual_seed(2)
        batch["loss_mask"] = torch.rand(5, 16, generator=generator) * (
            torch.rand(5, 16, generator=generator) < 0.7
        )
    return batch


def _outcome(case: Case, context: ParallelContext) -> Outcome:
    model = prepared(case.config, context)
    engine = engine_of(lower(model), poison=True)
    micro_batches = pieces(_batch(case), case.size, context)
    loss, gradients = train(engine, model, micro_batches)
    assert torch.equal(engine.evaluate(micro_batches), loss)
    logits = engine.predict(micro_batches)
    assert engine.lanes.ledger.slots == 0
    return loss, export_llama(model, reduced(model, gradients)), logits


def _outcomes_of_rank(rank: int) -> dict[str, Outcome]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    return {name: _outcome(case, context) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def outcomes_of_two_ranks() -> list[dict[str, Outcome]]:
    return run_ranks(2, _outcomes_of_rank)


@cache
def _expected(name: str) -> Outcome:
    case = CASES[name]
    reference, batch = hugging_face_llama(case.config), _batch(case)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    weights = (batch["labels"] != -100).float() * batch.get("loss_mask", 1.0)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, reference(batch["tokens"]).logits.detach()


def _check(name: str, outcome: Outcome) -> None:
    loss, gradients, logits = outcome
    expected_loss, expected, expected_logits = _expected(name)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert abs(loss - expected_loss) <= 1e-6 * expected_loss
    assert gradients.keys() == expected.keys()
    errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
    assert max(errors.values()) <= 1e-5, errors
    assert logits.shape == expected_logits.shape
    assert relative_error(logits, expected_logits) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str) -> None:
    _check(name, _outcome(CASES[name], ParallelContext.single(CPU)))


@pytest.mark.parametrize("name", CASES)
def test_two_tensor_ranks_with_sequence_parallelism(
    name: str, outcomes_of_two_ranks: list[dict[str, Outcome]]
) -> None:
    for outcomes in outcomes_of_two_ranks:
        _check(name, outcomes[name])


def test_the_micro_batch_size_changes_neither_loss_nor_gradients() -> None:
    outcomes = [
        _outcome(Case(SMALL, size, masked=True), ParallelContext.single(CPU))
        for size in (1, 2, 3, 5, 8)
    ]
    loss, gradients, logits = outcomes[0]
    for other_loss, others, other_logits in outcomes[1:]:
        assert abs(other_loss - loss) <= 1e-6 * loss
        errors = {name: relative_error(others[name], gradients[name]) for name in gradients}
        assert max(errors.values()) <= 1e-6, errors
        assert relative_error(other_logits, logits) <= 1e-6


def test_a_batch_in_which_nothing_counts_has_loss_and_gradients_of_zero() -> None:
    context = ParallelContext.single(CPU)
    model = prepared(SMALL, context)
    batch = batch_of(SMALL)
    batch["labels"].fill_(-100)
    loss, gradients = train(engine_of(lower(model)), model, pieces(batch, 2, context))
    assert loss == 0 and all(torch.all(gradient == 0) for gradient in gradients.values())


def test_evaluation_has_no_dropout() -> None:
    context = ParallelContext.single(CPU)
    batch = pieces(batch_of(SMALL), 2, context)
    still, dropping = (prepared(replace(SMALL, hidden_dropout=p), context) for p in (0.0, 0.5))
    dropping.eval()
    with_dropout = engine_of(lower(dropping))
    without = engine_of(lower(still))
    assert not torch.equal(with_dropout.train(batch), without.train(batch))
    assert torch.equal(with_dropout.predict(batch), without.predict(batch))
    assert torch.equal(with_dropout.evaluate(batch), without.evaluate(batch))
