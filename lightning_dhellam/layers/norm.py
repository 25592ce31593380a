"""A norm of the model with the kernel that computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.writer import main_grad


@dataclass(frozen=True)
class NormLowering:
    """What the operators of one norm call: RMSNorm, or LayerNorm where the module has a bias.

    Attributes:
        module: has `weight`, `eps` and perhaps `bias`; they are read and accumulated in place.
        kernels: what computes the operators.
    """

    module: Any
    kernels: Kernels

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Weight and, of a LayerNorm, bias."""
        bias = getattr(self.module, "bias", None)
        return (self.module.weight,) if bias is None else (self.module.weight, bias)

    @property
    def operator(self) -> str:
        """The operator among the kernels."""
        return "rms_norm" if len(self.parameters) == 1 else "layer_norm"

    @property
    def statistics(self) -> int:
        """fp32 numbers that are kept of each token: as many as parameters of a channel."""
        return len(self.parameters)

    @property
    def fuses(self) -> bool:
        """Whether the sum of the residual stream and its norm are one operator."""
        return self.kernels.names[self.operator] == "triton"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [..., H] normalised, and the statistics for `backward`."""
        result: tuple[Tensor, Tensor]
        result = self._kernel.forward(x, *self.parameters, self.module.eps)
        return result

    def residual_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of `x` and `residual` [..., H], and `forward` of it."""
        result: tuple[Tensor, Tensor, Tensor]
        result = self._kernel.residual_forward(x, residual, *self.parameters, self.module.eps)
        return result

    def backward(
        self, dy: Tensor, x: Tensor, statistics: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Gradient by `x`, plus `residual`. Adds to the gradients of what is not frozen."""
        dx: Tensor
        dx, *grads = self._kernel.backward(dy, x, self.module.weight, statistics, residual)
        for parameter, grad in zip(self.parameters, grads, strict=True):
            if parameter.requires_grad:  # the kernels compute all gradients at once
                main_grad(parameter).add_(grad)
        return dx

    @property
    def _kernel(self) -> Any:
        return getattr(self.kernels, self.operator)
