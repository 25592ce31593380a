"""The copy that plays a link on SMs: what it moves, and that it keeps its pace."""

from __future__ import annotations

import pytest
import torch

from lightning_dhellam.kernels.paced_copy import paced_copy
from lightning_dhellam.kernels.paced_copy import triton as kernel
from lightning_dhellam.parallel.link import median_seconds

pytestmark = pytest.mark.gpu

CHUNK = 2 * kernel._CHUNK
"""Bytes that a program moves at a time."""


def _buffers(chunks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randn(chunks * CHUNK // 2, device=device).bfloat16()
    return source, torch.zeros_like(source)


@pytest.mark.parametrize("sms", [1, 3, 16])
@pytest.mark.parametrize("crossing", [1, 16, 20, 50])
def test_as_many_bytes_move_as_cross(sms: int, crossing: int, device: torch.device) -> None:
    """In chunks: at least one for each program, and round again where the buffers are small."""
    source, out = _buffers(32, device)
    paced_copy(source, out, (crossing - 1) * CHUNK + 1, 0.0, sms)
    moved = min(max(crossing, sms), 32) * CHUNK // 2
    assert torch.equal(out[:moved], source[:moved])
    assert not out[moved:].any()


@pytest.mark.parametrize("seconds", [1e-3, 0.2])
def test_the_pace_is_kept_however_long_it_takes(seconds: float, device: torch.device) -> None:
    source, out = _buffers(64, device)
    taken = median_seconds(lambda: paced_copy(source, out, 4096 * CHUNK, seconds, 16), repeats=3)
    assert taken >= 0.999 * seconds


def test_what_is_on_its_way_stays_in_registers(device: torch.device) -> None:
    """With what does not fit a link is slower than asked, most at the clock of a busy GPU."""
    source, out = _buffers(32, device)
    compiled = kernel._paced_copy[(1,)](source, out, 32, 32, 10, CHUNK=CHUNK // 2, num_warps=32)
    assert compiled.n_spills == 0
