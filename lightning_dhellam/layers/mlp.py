"""A two-layer perceptron as operators: with a gate and SiLU, or with GELU.

forward   gather|fc1  swiglu  fc2|scatter
backward  gather|fc2  swiglu  fc1|scatter
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.utils import openai_gelu
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import gelu, silu

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.kernels.protocols import ActivationKernel
from lightning_dhellam.layers.block import Setting, Supported, check_config
from lightning_dhellam.layers.gathered_bits import largest_of
from lightning_dhellam.layers.linear import ColumnLinear, RowLinear
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.plan.layout import Held


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU as tanh approximates it, for a `TransformerConfig`: Megatron-core's own compiles."""
    return gelu(x, approximate="tanh")


SUPPORTED: Supported = {
    "activation_func": (silu, gelu, gelu_tanh, openai_gelu),
    "activation_func_clamp_value": (None,),
    "gated_linear_unit": (True, False),
    "glu_linear_offset": (0.0,),
}


@dataclass(frozen=True)
class Mlp:
    """A Megatron-core `MLP`.

    Attributes:
        fc1: from hidden states to what the activation reads.
        fc2: from what the activation gives to hidden states.
        gated: whether `fc1` computes a gate as well.
        kernel: of the activation.
        prefix: of the names of its slots and operators, where a block has another MLP.
    """

    fc1: ColumnLinear
    fc2: RowLinear
    gated: bool
    kernel: ActivationKernel
    prefix: str = ""

    @classmethod
    def of(cls, module: Any, setting: Setting, prefix: str = "") -> Mlp:
        """What lowers `module`; what it would compute otherwise is refused by name."""
        return cls(
            ColumnLinear.of(module.linear_fc1, "fc1", Held.FFN, setting, prefix),
            RowLinear.of(module.linear_fc2, "fc2", Held.FFN, setting, prefix),
            module.config.gated_linear_unit,
            activation_of(module.config, setting.kernels),
            prefix,
        )

    @property
    def output(self) -> str:
        """The name of the result, which is that of its last linear layer."""
        return self.fc2.name

    @property
    def bias(self) -> Parameter | None:
        """The bias of its last linear layer, which joins with the residual stream."""
        return self.fc2.bias

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the operators of forward. Returns the slot of the result [s, B, hidden]."""
        self.fc1.forward(w, read, self._inner)
        measures = self.fc2.measures
        w.compute(
            self._activation,
            (self._inner,),
            _made(self._act, w.sizes.wide(self._narrow), measures),
            self.kernel.forward_measured if measures else self.kernel.forward,
            moved=w.sizes.wide(self._broad + self._narrow),
        )
        return self.fc2.forward(w, self._act)

    def written(self, w: GraphWriter) -> str:
        """The slot of the result that `forward` returned."""
        return self.fc2.written(w)

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add the operators of backward. Returns the slot of the gradient by `read`."""
        self.fc2.backward(w, grad, self._act)
        measures = self.fc1.measures
        w.compute(
            f"{self._activation}.grad",
            (f"d_{self._act}", self._inner),
            _made(f"d_{self._inner}", w.sizes.wide(self._broad), measures),
            self.kernel.backward_measured if measures else self.kernel.backward,
            moved=w.sizes.wide(2 * self._broad + self._narrow),
        )
        return self.fc1.backward(w, f"d_{self._inner}", read)

    @property
    def _activation(self) -> str:
        """The operator between the two linear layers."""
        return self.prefix + ("swiglu" if self.gated else "gelu")

    @property
    def _inner(self) -> str:
        """The slot of what the activation reads."""
        return self.prefix + ("gate_up" if self.gated else "up")

    @property
    def _act(self) -> str:
        """The slot of what the activation gives."""
        return f"{self.prefix}act"

    @property
    def _broad(self) -> int:
        """Channels that the activation reads."""
        return self.fc1.weight.shape[0]

    @property
    def _narrow(self) -> int:
        """Channels that the activation writes."""
        return self.fc2.weight.shape[1]


def _made(slot: str, size: float, measures: bool) -> dict[str, float]:
    """What an activation writes, with bytes per token: also how large it is, if it `measures`."""
    return {slot: size} | ({largest_of(slot): 0.0} if measures else {})


def activation_of(config: Any, kernels: Kernels) -> ActivationKernel:
    """What computes the activation of an MLP; one that has no lowering is refused by name."""
    check_config(config, SUPPORTED)
    gated = config.gated_linear_unit
    if (config.activation_func is silu) != gated:
        raise ValueError(
            f"TransformerConfig.gated_linear_unit={gated} with activation_func="
            f"{config.activation_func.__name__} cannot be lowered to operators: use silu with a"
            " gate, or gelu without one"
        )
    if gated:
        return kernels.swiglu
    return kernels.gelu if config.activation_func is gelu else kernels.gelu_tanh
