"""What a block of a layer is, and what it is lowered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch.nn import Parameter

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.fp8_formats import Fp8
from lightning_dhellam.layers.rotary import RotaryTable
from lightning_dhellam.layers.ways import Way
from lightning_dhellam.layers.writer import GraphWriter, Sizes

Supported = Mapping[str, tuple[Any, ...]]
"""Values of `TransformerConfig` that a block reproduces, by field."""


@dataclass(frozen=True)
class Setting:
    """What the blocks of one layer are lowered with.

    Attributes:
        sizes: that sizes of slots and costs follow from.
        kernels: what computes the operators.
        rotary: cosines and sines of the positions; None for a model without rotary embedding.
        index: of the layer in the model, which enters its random numbers.
        way: by which keys come to the ranks that share a sequence; None where each has its own.
        eight: how linear layers compute in 8 bits; None where they do not.
    """

    sizes: Sizes
    kernels: Kernels
    rotary: RotaryTable | None
    index: int
    way: Way | None = None
    eight: Fp8 | None = None


class Block(Protocol):
    """Attention, an MLP: from normalised hidden states to what is added to the residual stream.

    With tensor parallelism both are split along the sequence. Forward and backward are written
    side by side: what backward reads of forward's slots is what a layer saves.
    """

    @property
    def output(self) -> str:
        """Names the block's result: its gradient is in the slot `d_` and this."""

    @property
    def bias(self) -> Parameter | None:
        """Is added to the result where it joins the residual stream, as in Megatron-core."""

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the operators of forward. Returns the slot of the result."""

    def written(self, w: GraphWriter) -> str:
        """The slot of the result that `forward` returned."""

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add the operators of backward, from `grad` of the result.

        Returns the slot of the gradient by `read`, which `forward` was given.
        """


def check_config(config: Any, supported: Supported) -> None:
    """Refuse a `TransformerConfig` of which a block would silently compute something else.

    Raises:
        ValueError: naming the field, its value and what is supported.
    """
    for name, allowed in supported.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            shown = " or ".join(getattr(v, "__name__", repr(v)) for v in allowed)
            raise ValueError(
                f"TransformerConfig.{name}={getattr(value, '__name__', repr(value))} cannot be"
                f" lowered to operators: use {shown}"
            )


def check_class(module: Any, wanted: type, role: str, index: int) -> None:
    """Refuse a part of layer `index` that has another class than the one that is lowered.

    A subclass may compute anything, so it is refused as well.

    Raises:
        ValueError: naming the part, its class and the class to use.
    """
    if type(module) is not wanted:
        raise ValueError(
            f"layer {index}: its {role} is a {type(module).__name__}, which has no lowering: use"
            f" Megatron-core's {wanted.__name__}"
        )
