"""On GPUs fp16 trains as fp32 does, and an overflow leaves the step out on all ranks."""

from __future__ import annotations

import pytest

from tests.gpu.test_several import needs
from tests.parallel.test_loss_scale import CASES, check_overflow, overflow, same_numbers
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world", [1, 2])
def test_numbers_and_overflows(world: int) -> None:
    needs(world)
    run_ranks(world, same_numbers, CASES[world], "cuda", backend="nccl")
    check_overflow(run_ranks(world, overflow, "cuda", backend="nccl"))
