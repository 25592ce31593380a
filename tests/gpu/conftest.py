"""A GPU that computes reproducibly and in true fp32, for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_dhellam.kernels.deterministic import deterministic, prepare

prepare()


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The first GPU; fp32 GEMMs do not use TF32, and algorithms are deterministic."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.cuda.set_device(0)
    with deterministic():
        yield torch.device("cuda", 0)
        torch.cuda.synchronize()
    torch.backends.cuda.matmul.allow_tf32 = tf32
