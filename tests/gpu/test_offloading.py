"""Slots that wait in pinned host memory, on one GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.offloading import ALL
from tests.engine.harness import batch_of, engine_of, pieces, train
from tests.engine.test_offloading import CONFIG, model_of, wrong

pytestmark = pytest.mark.gpu


@pytest.fixture
def context(device: torch.device) -> Iterator[ParallelContext]:
    yield ParallelContext.single(device)


def test_no_set_of_slots_changes_a_bit(context: ParallelContext) -> None:
    assert wrong(context, 12) == []


def test_the_device_holds_less_and_the_host_does_not_wait(context: ParallelContext) -> None:
    taken = {}
    batch = {k: v.to(context.device) for k, v in batch_of(CONFIG, 4, 64).items()}
    for what in (None, ALL):
        model = model_of(context)
        lowered = lower(model, recompute="none", offload=what)
        engine = engine_of(lowered, context.device, BUILDERS["sequential"])
        parts = pieces(batch, 2, context)
        for _ in range(2):
            train(engine, model, parts)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        buffers = lowered.host.bytes if lowered.host is not None else 0
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.train(parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        taken[what] = torch.cuda.max_memory_allocated() - before
        assert lowered.host is None or lowered.host.bytes == buffers > 0
    assert taken[ALL] < 0.8 * taken[None]
