"""Host memory that a save takes, by allocations: no more than what the rank writes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_dhellam import checkpoint
from lightning_dhellam.parallel import ParallelContext

SIZE = 2**25


def _peak(state: dict[str, Tensor], path: Path) -> int:
    """Bytes that saving has held at most, of tensors and of all else."""
    context = ParallelContext.single(torch.device("cpu"))
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            checkpoint.save(path, context, {}, state, {})
        of_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.profiler is not None and found.profiler.kineto_results is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak + of_python


@pytest.mark.parametrize(
    ("which", "copied"), [("of their own memory", False), ("parts of others", True)]
)
def test_a_save_holds_no_more_than_its_own_shard(which: str, copied: bool, tmp_path: Path) -> None:
    """Parts of others are copied to be written, as tensors of a device are."""
    parts = torch.arange(SIZE // 4, dtype=torch.float32).view(16, -1)
    state = {str(n): part if copied else part.clone() for n, part in enumerate(parts)}
    checkpoint.save(tmp_path / "warm.ckpt", ParallelContext.single(torch.device("cpu")), {}, {}, {})
    peak = _peak(state, tmp_path / "a.ckpt")
    written = (tmp_path / "a.ckpt" / "__0_0.distcp").stat().st_size
    assert written >= SIZE
    assert peak <= 1.1 * SIZE if copied else peak <= 0.1 * SIZE, which
