"""What the Triton kernels need to know of the device and of sizes, computed once."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lightning_dhellam.kernels.linear.processors import processors

_ELEMENTS = 2048
"""Of a program whose elements have nothing to do with each other."""


PARTS = 1024
"""Most programs that leave the largest number of what each has seen."""


@cache
def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return int(triton.next_power_of_2(size))


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` elements in registers.

    16 elements for each thread: two 16-byte loads of a 16-bit type.
    """
    return max(1, min(16, block // 512))


def row_programs(rows: int, device: torch.device) -> int:
    """Programs that share `rows` rows: two to a multiprocessor, as many as registers allow."""
    if device.type != "cuda":
        return min(rows, 4)  # Triton's interpreter
    return min(rows, 2 * processors(device))


def part_programs(device: torch.device, each: int = 4) -> int:
    """Programs that share a tensor in parts: `each` multiprocessor has as many."""
    return min(PARTS, each * processors(device)) if device.type == "cuda" else 4


def interpreted() -> bool:
    """Whether Triton interprets kernels, on the CPU, and does not compile them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def each_element(kernel: Any, *read: Tensor) -> Tensor:
    """What a kernel makes of the elements of tensors of one shape, in the type of the last.

    The kernel takes them, the result, how many elements there are, and BLOCK of them a program.
    """
    read = tuple(tensor.contiguous() for tensor in read)
    made = torch.empty_like(read[-1])
    size = made.numel()
    kernel[(blocks(size, _ELEMENTS),)](*read, made, size, BLOCK=_ELEMENTS, num_warps=4)
    return made
