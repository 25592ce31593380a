"""Rotary embedding of frequencies that Megatron-core's own does not have.

They may depend on how long sequences are (longrope, arXiv 2402.13753; dynamic), and some channels
may not turn at all: these have the frequency 0. Queries and keys may grow by a factor where they
turn, which is the square of it in the scores (`ModelConfig.softmax_scale`).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor, log, pi

import torch
from torch import Tensor, nn

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.rotary_fields import LLAMA_3


class ScaledRotary(nn.Module):
    """Stands for Megatron-core's `RotaryEmbedding`.

    Args:
        config: of the model.
        device: of the frequencies.

    Attributes:
        shrinking: factors [width] on a head's channels, see the function; None for none.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.device = device
        factors = shrinking(config)
        self.shrinking = None if factors is None else torch.tensor(factors, device=device)
        self._found: dict[int, Tensor] = {}

    def frequencies(self, length: int) -> Tensor:
        """The frequencies [width / 2] of sequences of `length`, in fp32."""
        if length not in self._found:
            self._found[length] = frequencies(self.config, length).to(self.device)
        return self._found[length]

    def forward(self, length: int) -> Tensor:
        """Angles [length, 1, 1, width] of all positions of a sequence, as Megatron-core's layers
        take them."""
        positions = torch.arange(length, dtype=torch.float32, device=self.device)
        angles = torch.outer(positions, self.frequencies(length))
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def is_scaled(config: ModelConfig) -> bool:
    """Whether a model needs `ScaledRotary`, or has the frequencies of Megatron-core's module."""
    by_factor = config.rope_scaling_factor is not None and config.rope_scaling != "llama3"
    partial = config.turning(config.kv_channels) < config.kv_channels
    return by_factor or partial or config.rope_short_factors is not None


def frequencies(config: ModelConfig, length: int) -> Tensor:
    """The frequencies [width / 2] of a model's heads over sequences of `length`, in fp32.

    Those of channels that do not turn are 0, and come last.
    """
    width = config.turning(config.kv_channels)
    found = _scaling(config)(config, width, length)
    return torch.nn.functional.pad(found, (0, (config.kv_channels - width) // 2))


def _scaling(config: ModelConfig) -> Callable[[ModelConfig, int, int], Tensor]:
    if config.rope_short_factors is not None:
        return _long
    if config.rope_scaling_factor is None:
        return _plain
    return {"llama3": _llama3, "linear": _linear, "dynamic": _dynamic, "yarn": _yarn}[
        config.rope_scaling
    ]


def _periods(base: float, width: int) -> Tensor:
    """Reciprocals of the frequencies as they are without scaling."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return torch.as_tensor(base**exponents)


def _plain(config: ModelConfig, width: int, length: int) -> Tensor:
    return 1.0 / _periods(config.rotary_base, width)


def _long(config: ModelConfig, width: int, length: int) -> Tensor:
    assert config.rope_original_length is not None
    is_long = length > config.rope_original_length
    factors = config.rope_long_factors if is_long else config.rope_short_factors
    return 1.0 / (torch.tensor(factors) * _periods(config.rotary_base, width))


def _linear(config: ModelConfig, width: int, length: int) -> Tensor:
    assert config.rope_scaling_factor is not None
    return _plain(config, width, length) / config.rope_scaling_factor


def _dynamic(config: ModelConfig, width: int, length: int) -> Tensor:
    factor, original = config.rope_scaling_factor, config.rope_original_length
    assert factor is not None and original is not None
    longer = factor * max(length, original) / original - (factor - 1)
    return 1.0 / _periods(config.rotary_base * longer ** (width / (width - 2)), width)


def _yarn(config: ModelConfig, width: int, length: int) -> Tensor:
    factor, original = config.rope_scaling_factor, config.rope_original_length
    assert factor is not None and original is not None

    def pair(turns: float) -> float:
        """The number of the pair of channels that turns so often over the original length."""
        return width * log(original / (turns * 2 * pi)) / (2 * log(config.rotary_base))

    low, high = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (low == high)
    divided = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = _plain(config, width, length)
    return plain / factor * divided + plain * (1 - divided)


def _llama3(config: ModelConfig, width: int, length: int) -> Tensor:
    plain = _plain(config, width, length)
    low, high, original = LLAMA_3.values()
    kept = ((original * plain / (2 * pi) - low) / (high - low)).clamp(0, 1)
    assert config.rope_scaling_factor is not None
    return plain / config.rope_scaling_factor * (1 - kept) + plain * kept


def shrinking(config: ModelConfig) -> tuple[float, ...] | None:
    """Factors [width] on queries and keys, so that what does not turn does not grow.

    The scores grow as if all channels did. None where they do.
    """
    width, turning = config.kv_channels, config.turning(config.kv_channels)
    if turning == width or config.magnitude == 1.0:
        return None
    half = (*(1.0,) * (turning // 2), *(1 / config.magnitude,) * ((width - turning) // 2))
    return half * 2
