"""A GPU that computes reproducibly and in true fp32, for every test of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# cuBLAS reads it when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU; fp32 GEMMs do not use TF32, and algorithms are deterministic."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    torch.cuda.set_device(0)
    yield torch.device("cuda", 0)
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cuda.matmul.allow_tf32 = tf32
