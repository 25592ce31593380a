"""Cross-entropy over simulated ranks against float64 autograd on the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import cross_entropy
from tests.kernels.checks import assert_close, drawn


def _split_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, ranks: int, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-sum-exp and gradient through `ranks` ranks of `columns` columns each."""
    tokens, vocabulary = logits.shape
    padded = logits.new_full((tokens, ranks * columns), torch.nan)
    padded[:, :vocabulary] = logits
    shards = [shard.clone() for shard in padded.split(columns, dim=1)]
    valid = [max(0, min(columns, vocabulary - rank * columns)) for rank in range(ranks)]
    parts = [
        cross_entropy.statistics(shard.clone(), labels, rank * columns, valid[rank])
        for rank, shard in enumerate(shards)
    ]
    loss, lse = cross_entropy.combine(torch.stack(parts))
    for rank, shard in enumerate(shards):
        result = cross_entropy.backward_(shard, labels, lse, weights, rank * columns, valid[rank])
        assert result.data_ptr() == shard.data_ptr()
    grads = torch.cat(shards, dim=1)
    assert torch.all(grads[:, vocabulary:] == 0), "padded columns have a gradient"
    return loss, lse, grads[:, :vocabulary]


CASES = {
    # tokens, vocabulary, ranks, columns of a rank
    "whole": (13, 11, 1, 11),
    "padded": (13, 11, 1, 16),
    "two-ranks": (13, 22, 2, 11),
    "three-ranks-last-padded": (7, 31, 3, 12),
    "a-rank-of-padding-only": (9, 5, 3, 4),
    "one-token-one-column": (1, 1, 2, 1),
    "chunk-boundary": (cross_entropy.CHUNK + 3, 5, 2, 3),
    "exactly-one-chunk": (cross_entropy.CHUNK, 5, 1, 8),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(case: str, dtype: torch.dtype, device: torch.device) -> None:
    tokens, vocabulary, ranks, columns = CASES[case]
    logits = drawn((tokens, vocabulary), dtype, device) * 5
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    weights = torch.rand(tokens, generator=generator).to(device)
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), leaf)

    loss, lse, grads = _split_loss(logits, labels, weights, ranks, columns)
    assert loss.dtype == lse.dtype == torch.float32 and grads.dtype == dtype
    if vocabulary == 1:
        assert torch.all(loss == 0) and torch.all(grads == 0)
        return
    assert_close(
        {"loss": loss, "lse": lse},
        {"loss": expected.detach(), "lse": torch.logsumexp(leaf.detach(), 1)},
        1e-6,
    )
    # Next to a confident prediction the gradient is a difference of nearly equal numbers.
    tolerance = 5e-6 if dtype is torch.float32 else 5e-3
    assert_close({"gradient": grads}, {"gradient": gradient}, tolerance)


def test_large_logits_neither_overflow_nor_vanish(device: torch.device) -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4], [-3e4, -3e4, -3e4]], device=device)
    labels = torch.tensor([1, 2], device=device)
    loss, _, grads = _split_loss(logits, labels, torch.ones(2, device=device), 3, 1)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    assert torch.isfinite(grads).all()


def test_a_weight_of_zero_silences_a_token(device: torch.device) -> None:
    logits = drawn((4, 9), torch.float32, device)
    labels = torch.tensor([0, 1, 2, 3], device=device)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0], device=device)
    _, _, grads = _split_loss(logits, labels, weights, 1, 9)
    assert torch.all(grads[1::2] == 0) and torch.all(grads[::2].abs().sum(1) > 0)


def test_statistics_leave_the_logits_as_they_are(dtype: torch.dtype, device: torch.device) -> None:
    logits = drawn((6, 9), dtype, device)
    before = logits.clone()
    cross_entropy.statistics(logits, torch.arange(6, device=device), 0, 7)
    assert torch.equal(logits, before)
