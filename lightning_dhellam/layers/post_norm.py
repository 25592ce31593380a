"""A block's result passes through a norm before it joins the residual stream (OLMo-2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Sum = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Of a block's result with its bias, and the stream; with the probability of dropping."""


class NormedSum(nn.Module):
    """Stands for Megatron-core's sum of bias, dropout and stream in a layer specification.

    Args:
        config: of the layer.
        make: the class of the norm.

    Attributes:
        norm: of the block's result, its bias included.
    """

    def __init__(self, config: TransformerConfig, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = make(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Sum:
        """What makes the sum, as Megatron-core's layers ask for it."""
        add: Any = get_bias_dropout_add(training, fused)

        def run(given: tuple[Tensor, Tensor | None], residual: Tensor, p: float) -> Tensor:
            x, bias = given
            found: Tensor = add((self.norm(x if bias is None else x + bias), None), residual, p)
            return found

        return run
