"""Plain torch: ground truth, and the path on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def take_changes_(master: Tensor, weight: Tensor) -> None:
    """Replace the elements of `master`, in fp32, that do not round to those of `weight`, in bf16
    or fp16.

    Bits are compared, so that NaN and signed zeros are values like others.
    """
    changed = master.to(weight.dtype).view(torch.int16) != weight.view(torch.int16)
    torch.where(changed, weight, master, out=master)
