"""Weights in bf16 or fp16 and their master copies in fp32, brought to agree."""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels.masters import reference


def take_changes_(master: Tensor, weight: Tensor) -> None:
    """Where more than rounding sets `weight` [...], in bf16 or fp16, apart from `master`, take it
    over.

    An element of `master`, in fp32, that rounds to that of `weight` keeps its low bits. Nothing is
    read on the host.
    """
    if weight.is_cuda and weight.is_contiguous() and master.is_contiguous():
        from lightning_dhellam.kernels.masters import triton

        triton.take_changes_(master, weight)
    else:
        reference.take_changes_(master, weight)
