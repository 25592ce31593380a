"""Cosines and sines of the positions, computed once per sequence length and device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RotaryTable:
    """Tables for Megatron-core's `RotaryEmbedding`, whose frequencies they are made from.

    Args:
        rotary: the module that holds `inv_freq`, or says the `frequencies` of a length, and
            perhaps factors on channels, `shrinking`.
        ranks: that share each sequence by context parallelism.
    """

    def __init__(self, rotary: Any, ranks: int = 1) -> None:
        self.rotary = rotary
        self.ranks = ranks
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`cos` and `sin` [L, D] in fp32 for all L positions of a sequence.

        This rank has the tokens of `like` [S, ...] of it.
        """
        key = (like.shape[0] * self.ranks, like.device)
        if key not in self._tables:
            self._tables[key] = self._make(*key)
        return self._tables[key]

    def _make(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float32, device=device)
        of_length = getattr(self.rotary, "frequencies", None)
        frequencies = self.rotary.inv_freq if of_length is None else of_length(length)
        angles = torch.outer(positions, frequencies.to(device))
        angles = torch.cat([angles, angles], dim=-1)
        factors = getattr(self.rotary, "shrinking", None)
        if factors is None:
            return angles.cos(), angles.sin()
        return angles.cos() * factors.to(device), angles.sin() * factors.to(device)
