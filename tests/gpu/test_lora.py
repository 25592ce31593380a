"""On GPUs adapters train as in Hugging Face's model, alone and where ranks share the layers."""

from __future__ import annotations

import pytest

from tests.gpu.test_several import needs
from tests.ranks import run_ranks
from tests.runner.test_lora import check_gradients, check_merged, outcomes_of_rank

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world", [1, 2])
def test_loss_gradients_and_merged_weights_are_hugging_faces(world: int) -> None:
    needs(world)
    of_ranks = run_ranks(world, outcomes_of_rank, world, "cuda", backend="nccl")
    check_gradients(world, of_ranks, "cuda")
    check_merged(world, of_ranks, "cuda")
