"""Unequal numbers of tokens on data-parallel GPUs, whose weights come by NCCL on the `dp` lane."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.strategy.test_unequal import on_ranks

pytestmark = pytest.mark.gpu


def test_loss_and_weights_are_those_of_one_process_on_the_global_batch() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    (expected,) = run_ranks(1, on_ranks, 1, [{"micro_batch_size": 4}], "gpu", backend="nccl")
    for rank in run_ranks(2, on_ranks, 2, [{}], "gpu", backend="nccl"):
        for (losses, weights), (alone, truth) in zip(rank, expected, strict=True):
            torch.testing.assert_close(losses, alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights, truth, rtol=1e-5, atol=1e-5)
