"""Cosines and sines of the positions, computed once per sequence length and device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Tables for Megatron-core's `RotaryEmbedding`, whose frequencies they are made from.

    Args:
        rotary: the module that holds `inv_freq`.
    """

    def __init__(self, rotary: Any) -> None:
        self.rotary = rotary
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`cos` and `sin` [S, D] in fp32 for the sequence of `like` [S, ...]."""
        key = (like.shape[0], like.device)
        if key not in self._tables:
            self._tables[key] = self._make(*key)
        return self._tables[key]

    def _make(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, self.rotary.inv_freq.to(device))
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()
