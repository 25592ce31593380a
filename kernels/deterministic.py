"""Torch's switch for algorithms that compute the same bits in every run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def prepare() -> None:
    """Let cuBLAS compute the same bits on several streams at once: before the first GEMM.

    The workspace is as large as torch's own on Hopper. What the user has set stays.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(*, strict: bool = True) -> Iterator[None]:
    """Kernels that are chosen and launched inside add up in a fixed order.

    New memory is filled with NaN, as torch does unless told otherwise, so a value that was never
    written gives NaN. Afterwards the switch is as it was.

    Args:
        strict: operators that have no fixed order raise, and on CUDA GEMMs too where `prepare` was
            not called in time. Otherwise torch only warns, and its flash attention keeps its own
            order.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
