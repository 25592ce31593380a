"""Triton: 6 bytes are read for each element, and nothing is written where nothing has changed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks

_BLOCK = 4096


def take_changes_(master: Tensor, weight: Tensor) -> None:
    """Do what `reference.take_changes_` does, of contiguous tensors."""
    size = master.numel()
    grid = (blocks(size, _BLOCK),)
    _take_changes[grid](
        master, weight.view(torch.int16), size,
        FP16=weight.dtype == torch.float16, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


@triton.jit
def _take_changes(
    master: tl.tensor, weight: tl.tensor, size: tl.tensor, FP16: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    value = tl.load(master + at, mask=inside, other=0.0)
    own = tl.load(weight + at, mask=inside, other=0)
    if FP16:
        changed = value.to(tl.float16).to(tl.int16, bitcast=True) != own
        taken = own.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        # The upper half, rounded to the nearest and to even between two, as a copy to bf16 does.
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        changed = rounded.to(tl.int16) != own
        taken = (own.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    tl.store(master + at, taken, mask=inside & changed)
