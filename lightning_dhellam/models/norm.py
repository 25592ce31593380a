"""Norms that take part in sequence parallelism, which Megatron's own torch norms refuse."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scale the last dimension to unit root mean square; statistics in fp32.

    The constructor is that of a norm in a Megatron layer spec. With sequence parallelism every
    rank sees its own tokens only, so the weight is marked for the all-reduce of its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., hidden] to the same shape and dtype."""
        x_float = x.float()
        scale = torch.rsqrt(x_float.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (x_float * scale).to(x.dtype)


class LayerNorm(nn.Module):
    """Shift the last dimension to zero mean, scale it to unit variance; statistics in fp32.

    As `RMSNorm`, with a bias.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight, self.bias = nn.Parameter(ones), nn.Parameter(torch.zeros_like(ones))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., hidden] to the same shape and dtype."""
        weight, bias = self.weight.float(), self.bias.float()
        shape = weight.shape
        return nn.functional.layer_norm(x.float(), shape, weight, bias, self.eps).to(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""By Megatron's names."""
