"""Rotary embedding whose frequencies depend on how long sequences are (longrope, arXiv 2402.13753).

Each frequency is divided by a factor of its own: one for sequences of the length that the model was
trained on first, another for longer ones. Queries and keys grow by a factor as well, which is the
square of it in the scores (`ModelConfig.softmax_scale`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LongRotary(nn.Module):
    """Stands for Megatron-core's `RotaryEmbedding` where frequencies depend on the length.

    Args:
        width: of a head.
        base: period of the slowest frequency but one step, as of a `RotaryEmbedding`.
        short: factors [width / 2] of sequences of at most `original` tokens.
        long: those of longer ones.
        original: tokens up to which `short` holds.
        device: of the frequencies.
    """

    def __init__(
        self,
        width: int,
        base: float,
        short: Sequence[float],
        long: Sequence[float],
        original: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.original = original
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        factors = (torch.tensor(one, dtype=torch.float32, device=device) for one in (short, long))
        self.short, self.long = (1.0 / (each * base**exponents) for each in factors)

    def frequencies(self, length: int) -> Tensor:
        """The frequencies [width / 2] of sequences of `length`, in fp32."""
        return self.long if length > self.original else self.short

    def forward(self, length: int) -> Tensor:
        """Angles [length, 1, 1, width] of all positions of a sequence, as Megatron-core's layers
        take them."""
        frequencies = self.frequencies(length)
        positions = torch.arange(length, dtype=torch.float32, device=frequencies.device)
        angles = torch.outer(positions, frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]
