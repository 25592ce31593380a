"""Host memory that a save takes, by allocations: no more than what the rank writes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lightning_dhellam import checkpoint
from lightning_dhellam.checkpoint.staging import Staging
from lightning_dhellam.parallel import ParallelContext

SIZE = 2**25
CONTEXT = ParallelContext.single(torch.device("cpu"))


def _peak(save: Callable[[], None]) -> int:
    """Bytes that saving has held at most, of tensors and of all else.

    What is asked for is counted, not what the process has: that may have room from earlier.
    """
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            save()
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
    _warm(tmp_path)
    peak = _peak(lambda: checkpoint.save(tmp_path / "a.ckpt", CONTEXT, {}, state, {}))
    assert _written(tmp_path) >= SIZE
    assert peak <= 1.1 * SIZE if copied else peak <= 0.1 * SIZE, which


def test_copies_for_writing_beside_training_take_the_room_of_what_is_written(
    tmp_path: Path,
) -> None:
    """And no more, until the file is there."""
    parts = torch.arange(SIZE // 4, dtype=torch.float32).split(SIZE // 64)
    state = {str(number): part for number, part in enumerate(parts)}
    staging = Staging(CONTEXT.device)

    def save() -> None:
        prepared = checkpoint.prepare(tmp_path / "a.ckpt", CONTEXT, {}, state, {})
        prepared.stage(staging)
        checkpoint.write(prepared, None)

    _warm(tmp_path)
    try:
        assert SIZE <= _peak(save) <= 1.1 * SIZE
        assert SIZE <= staging.size <= SIZE + 2**10
    finally:
        staging.close()
    assert _written(tmp_path) >= SIZE


def _warm(folder: Path) -> None:
    """What the first save of a process imports is not part of what a save takes."""
    checkpoint.save(folder / "warm.ckpt", CONTEXT, {}, {"a": torch.ones(4)}, {})


def _written(folder: Path) -> int:
    return (folder / "a.ckpt" / "__0_0.distcp").stat().st_size
