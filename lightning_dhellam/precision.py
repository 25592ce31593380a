"""Types of weights, gradients and master weights by the name of a precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numbers:
    """The types that a run computes and accumulates in.

    Attributes:
        dtype: of weights and activations.
        fp32_gradients: whether gradients are accumulated in fp32, or else in `dtype`.
        master_weights: whether the optimizer steps fp32 copies of the weights.
        scales_loss: whether the loss is scaled, so that gradients do not vanish.
    """

    dtype: torch.dtype
    fp32_gradients: bool
    master_weights: bool
    scales_loss: bool = False


PRECISIONS = {
    "32-true": Numbers(torch.float32, fp32_gradients=True, master_weights=False),
    "bf16-mixed": Numbers(torch.bfloat16, fp32_gradients=True, master_weights=True),
    "16-mixed": Numbers(torch.float16, fp32_gradients=True, master_weights=True, scales_loss=True),
    "bf16-true": Numbers(torch.bfloat16, fp32_gradients=False, master_weights=False),
}
"""Every precision that the engine's operators compute in, by Lightning's name for it."""
