"""A norm as operators: RMSNorm, or LayerNorm where the module has a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.block import Supported
from lightning_dhellam.layers.rules import OF_TOKENS
from lightning_dhellam.layers.writer import GraphWriter, main_grad

SUPPORTED: Supported = {
    "layernorm_zero_centered_gamma": (False,),
    "normalization": ("RMSNorm", "LayerNorm"),
}


@dataclass(frozen=True)
class Norm:
    """A norm of hidden states that are split along the sequence.

    Attributes:
        name: which its slots' and operators' names begin with.
        module: has `weight`, `eps` and perhaps `bias`; they are read and accumulated in place.
        kernels: what computes the operators.
    """

    name: str
    module: Any
    kernels: Kernels

    @classmethod
    def of(cls, module: Any, name: str, kernels: Kernels, where: str) -> Norm:
        """What lowers `module`; one that is no norm is refused, as that of `where`."""
        if getattr(module, "weight", None) is None or not hasattr(module, "eps"):
            raise ValueError(
                f"{where}: its {name} norm is a {type(module).__name__}, which has no lowering: use"
                " a norm that has a weight and eps, such as lightning_dhellam's RMSNorm"
            )
        return cls(name, module, kernels)

    @property
    def output(self) -> str:
        """The slot of the normalised hidden states."""
        return f"{self.name}_norm"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Weight and, of a LayerNorm, bias."""
        bias = self._bias
        return (self.module.weight,) if bias is None else (self.module.weight, bias)

    @property
    def fuses(self) -> bool:
        """Whether the sum of the residual stream and its norm are one operator."""
        operator = "rms_norm" if self._bias is None else "layer_norm"
        return self.kernels.names[operator] == "triton"

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the norm of `read`. Returns the slot of the result."""
        w.compute(
            f"{self.name}.norm",
            (read,),
            self._writes(w),
            self.normalise,
            moved=2 * w.sizes.shard,
            rule=OF_TOKENS,
        )
        return self.output

    def forward_of_sum(self, w: GraphWriter, reads: tuple[str, str], write: str) -> str:
        """Add the sum of two slots and its norm, in one pass. Returns the slot of the norm."""
        rms = self.kernels.rms_norm.residual_forward
        layer = self.kernels.layer_norm.residual_forward
        weight, bias, eps = self.module.weight, self._bias, self.module.eps

        def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if bias is None:
                return rms(x, residual, weight, eps)
            return layer(x, residual, weight, bias, eps)

        alone = GraphWriter(w.name, w.direction, w.sizes)
        self.forward(alone, write)
        writes = {write: w.sizes.shard, **self._writes(w)}
        w.compute(
            f"{self.name}.residual_norm",
            reads,
            writes,
            run,
            moved=4 * w.sizes.shard,
            rule=OF_TOKENS,
            remakes=tuple(alone.operators),
        )
        return self.output

    def backward(
        self, w: GraphWriter, grad: str, x: str, write: str, residual: str | None = None
    ) -> None:
        """Add the gradient by `x`, plus the slot `residual`, and those of the parameters."""
        reads = (grad, x, self._statistics)
        w.compute(
            f"{self.name}.norm.grad",
            reads if residual is None else (*reads, residual),
            {write: w.sizes.shard},
            self.gradient,
            moved=(3 if residual is None else 4) * w.sizes.shard,
            accumulates=self.parameters,
            rule=OF_TOKENS,
        )

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [..., H] normalised, and the statistics that `gradient` needs."""
        weight, bias, eps = self.module.weight, self._bias, self.module.eps
        if bias is None:
            return self.kernels.rms_norm.forward(x, weight, eps)
        return self.kernels.layer_norm.forward(x, weight, bias, eps)

    def gradient(
        self, dy: Tensor, x: Tensor, statistics: Tensor, branch: Tensor | None = None
    ) -> Tensor:
        """The gradient by `x`, plus `branch`; adds those of the parameters in place."""
        rms, layer = self.kernels.rms_norm.backward, self.kernels.layer_norm.backward
        kernel = rms if self._bias is None else layer
        dx, *grads = kernel(dy, x, self.module.weight, statistics, branch)
        for parameter, one in zip(self.parameters, grads, strict=True):
            if parameter.requires_grad:  # the kernels compute all gradients at once
                main_grad(parameter).add_(one)
        return dx

    @property
    def _bias(self) -> Parameter | None:
        bias: Parameter | None = getattr(self.module, "bias", None)
        return bias

    @property
    def _statistics(self) -> str:
        """The slot of what backward needs of each token, a number for each parameter."""
        return f"{self.name}_rstd"

    def _writes(self, w: GraphWriter) -> dict[str, float]:
        numbers = len(self.parameters)
        return {self.output: w.sizes.shard, self._statistics: numbers * w.sizes.statistic}
