"""The paced copy in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 32768
"""Elements that a program moves between two looks at the timer: 64 KiB of 16-bit numbers."""


@triton.jit
def _now():  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def _paced_copy(source, out, chunks, size, nanoseconds, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    start = _now()
    mine = (chunks - program + programs - 1) // programs
    for index in range(mine):
        place = ((program + index * programs) * CHUNK) % size
        offsets = place + tl.arange(0, CHUNK)
        tl.store(out + offsets, tl.load(source + offsets))
        due = start + nanoseconds * (index + 1) // mine
        while _now() < due:
            pass


def paced_copy(
    source: torch.Tensor, out: torch.Tensor, crossing: int, seconds: float, sms: int
) -> None:
    """Move `crossing` bytes from `source` to `out` on `sms` SMs in at least `seconds`.

    Both are contiguous 16-bit buffers of one size, a multiple of 32768 elements; they are gone
    through again and again when they are smaller than `crossing`. One program for each SM, as a
    collective has one block of threads for each.
    """
    chunks = max(sms, -(-crossing // (2 * _CHUNK)))
    _paced_copy[(sms,)](
        source, out, chunks, source.numel(), round(seconds * 1e9), CHUNK=_CHUNK, num_warps=32
    )
