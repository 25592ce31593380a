"""A linear layer's GEMMs in 8 bits as operators, and what they read: casts with scales.

    step      weight.cast
    forward   cast  gemm             backward  grad.cast  dgrad  wgrad

A cast gives a matrix as it is, for one GEMM, and turned, for another: of the input `gemm` and
`wgrad`, of the gradient `dgrad` and `wgrad`, of the weight `gemm` and `dgrad`. What backward saves
is then the turned input, a byte for each number. Scales follow from the numbers alone, so that what
is made again has the same bits, whatever the plan. Weights are cast once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.kernels.fp8 import FORWARD, GRADIENT, ROWS, SQUARES, WHOLE, Block, Cast
from lightning_dhellam.kernels.places import is_hopper
from lightning_dhellam.kernels.protocols import Fp8Kernel
from lightning_dhellam.layers.rules import on_tp, products
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan import STEP_PREFIX
from lightning_dhellam.plan.layout import Held


@dataclass(frozen=True)
class Format:
    """What has which scale, in which type of 8 bits.

    Attributes:
        block: of activations and gradients that share a scale.
        squares: of weights.
        gradient: type of gradients; all else is E4M3.
        multiple: what channels must be a multiple of.
    """

    block: Block
    squares: Block
    gradient: torch.dtype
    multiple: int


FORMATS: Mapping[str, Format] = {
    "current": Format(WHOLE, WHOLE, GRADIENT, 16),
    "blockwise": Format(ROWS, SQUARES, FORWARD, 128),
}
"""By the names that users know."""


def check_name(fp8: str | None) -> None:
    """Refuse what is the name of no format.

    Raises:
        ValueError: with the names that there are.
    """
    if fp8 is not None and fp8 not in FORMATS:
        raise ValueError(f"fp8={fp8!r} must be one of {', '.join(FORMATS)}, or None")


def check_place(
    fp8: str, device: torch.device, dtype: torch.dtype, forced: Mapping[str, str] | None
) -> None:
    """Refuse a type of activations, or a CPU that was not told to emulate 8 bits.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    if dtype is torch.float16:
        raise ValueError(f"fp8={fp8!r} does not work with fp16 activations: use 'bf16-mixed'")
    if dtype is not torch.bfloat16 and device.type == "cuda":
        raise ValueError(f"fp8={fp8!r} casts activations of 16 bits: use precision='bf16-mixed'")
    if device.type != "cuda" and (forced or {}).get("fp8") != "reference":
        raise ValueError(_refusal(fp8, device))


def _refusal(fp8: str, device: torch.device) -> str:
    return (
        f"fp8={fp8!r} needs a GPU of compute capability 9.0 (H100) or newer and bf16 activations,"
        f" and the device is {device.type}: leave fp8 out, or let it be emulated, slowly, by"
        " kernels={'fp8': 'reference'}"
    )


def check_shapes(fp8: str, config: Any, tensor_parallel_size: int) -> None:
    """Refuse a `ModelConfig` whose linear layers cannot be computed in 8 bits.

    Raises:
        ValueError: it has experts, or a size that does not divide.
    """
    if config.num_experts is not None:
        raise ValueError(f"fp8={fp8!r}: {_NO_EXPERTS}")
    heads, keys = config.num_attention_heads, config.num_query_groups
    widths = {
        "hidden_size": config.hidden_size,
        "the heads of a rank": heads * config.kv_channels // tensor_parallel_size,
        "queries, keys and values of a rank": (heads + 2 * keys)
        * config.kv_channels
        // tensor_parallel_size,
        "ffn_hidden_size of a rank": config.ffn_hidden_size // tensor_parallel_size,
    }
    for name, width in widths.items():
        _check_width(fp8, name, width)


def _check_width(fp8: str, name: str, width: int) -> None:
    multiple = FORMATS[fp8].multiple
    if width % multiple:
        other = " or fp8='current', which takes multiples of 16," if multiple > 16 else ""
        raise ValueError(
            f"fp8={fp8!r} takes channels in multiples of {multiple}, and {name} has {width}: use"
            f" another size,{other} or leave fp8 out"
        )


_NO_EXPERTS = (
    "experts have no GEMMs in 8 bits here: leave fp8 out, or train a model without experts"
)


@dataclass(frozen=True)
class Recipe:
    """How the linear layers of a model compute in 8 bits.

    Attributes:
        name: of the format.
        kernel: what casts and multiplies.
    """

    name: str
    kernel: Fp8Kernel

    @classmethod
    def of(
        cls,
        fp8: str | None,
        kernels: Kernels,
        device: torch.device,
        dtype: torch.dtype,
        forced: Mapping[str, str] | None,
    ) -> Recipe | None:
        """What `fp8` names, of these kernels; None for None.

        Raises:
            ValueError: it is unknown, or the device cannot compute it and was not told to emulate.
        """
        check_name(fp8)
        if fp8 is None:
            return None
        check_place(fp8, device, dtype, forced)
        emulated = kernels.names["fp8"] == "reference"
        if emulated and "fp8" not in (forced or {}):
            raise ValueError(_refusal(fp8, device))
        if fp8 == "blockwise" and not emulated and device.type == "cuda" and not is_hopper(device):
            raise ValueError(
                "fp8='blockwise' needs a GPU of compute capability 9 (H100, H200), since cuBLAS"
                " multiplies such blocks on no other: use fp8='current'"
            )
        return cls(fp8, kernels.fp8)

    @property
    def format(self) -> Format:
        """Blocks and types."""
        return FORMATS[self.name]

    def refuse_experts(self, index: int) -> None:
        """Say that layer `index` has experts, which are not computed in 8 bits."""
        raise ValueError(f"layer {index}: fp8={self.name!r}: {_NO_EXPERTS}")


@dataclass(frozen=True)
class EightBits:
    """The GEMMs of one linear layer.

    Attributes:
        name: of the layer.
        weight: this rank's part [O, I].
        recipe: how they are computed.
    """

    name: str
    weight: Parameter
    recipe: Recipe

    @classmethod
    def of(
        cls, name: str, weight: Parameter, recipe: Recipe | None, index: int
    ) -> EightBits | None:
        """The GEMMs of a layer of this name in model layer `index`; None without a recipe."""
        if recipe is None:
            return None
        for width in weight.shape:
            _check_width(recipe.name, f"{name} of layer {index}", width)
        return cls(name, weight, recipe)

    def forward(
        self,
        w: GraphWriter,
        read: str,
        write: str,
        bias: Parameter | None,
        flops: float,
        ends: tuple[Held, Held],
    ) -> None:
        """Add `write` [..., O] from `read` [..., I]."""
        self._cast_weight(w)
        self._cast(w, f"{self.name}.cast", read, FORWARD, self.weight.shape[1])
        multiply, outputs, dtype = self.recipe.kernel.multiply, self.weight.shape[0], w.sizes.dtype
        w.compute(
            f"{self.name}.gemm",
            (_as_it_is(read), self._own),
            {write: w.sizes.wide(outputs)},
            lambda x, weight: multiply(_rows(x), weight, dtype, bias, fast=True).view(
                *x.values.shape[:-1], outputs
            ),
            flops=flops / _TIMES,
            shrinks=self.recipe.kernel.SHRINKS,
            rule=products(*ends),
        )

    def data_grad(
        self, w: GraphWriter, grad: str, write: str, flops: float, ends: tuple[Held, Held]
    ) -> None:
        """Add `write` [..., I] from the gradient in `grad` [..., O]."""
        outputs, inputs = self.weight.shape
        self._cast(w, f"{self.name}.grad.cast", grad, self.recipe.format.gradient, outputs)
        multiply, dtype = self.recipe.kernel.multiply, w.sizes.dtype
        w.compute(
            f"{self.name}.dgrad",
            (_as_it_is(grad), f"{self._own}_turned"),
            {write: w.sizes.wide(inputs)},
            lambda dy, weight: multiply(_rows(dy), weight, dtype).view(
                *dy.values.shape[:-1], inputs
            ),
            flops=flops / _TIMES,
            shrinks=self.recipe.kernel.SHRINKS,
            rule=products(*reversed(ends)),
        )

    def weight_grad(
        self,
        w: GraphWriter,
        grad: str,
        read: str,
        flops: float,
        ends: tuple[Held, Held],
        along: Held,
    ) -> None:
        """Add the weight's gradient to where it lies."""
        accumulate, weight = self.recipe.kernel.accumulate, self.weight
        reads, written = ends

        def run(dy: Cast, x: Cast) -> None:
            first = taken_first(weight)
            accumulate(main_grad(weight), dy, x, first=first)

        w.compute(
            f"{self.name}.wgrad",
            (_turned(grad), _turned(read)),
            {},
            run,
            flops=flops / _TIMES,
            accumulates=(weight,),
            shrinks=self.recipe.kernel.SHRINKS,
            rule=on_tp((written, reads), gradient=along),
        )

    @property
    def _own(self) -> str:
        """The slot of the weight as it is."""
        return f"{STEP_PREFIX}{self.name}.weight"

    def _cast_weight(self, w: GraphWriter) -> None:
        cast, weight, squares = self.recipe.kernel.cast, self.weight, self.recipe.format.squares
        scales = 1 if squares is None else weight.numel() // prod(squares)
        size = weight.numel() + scales * torch.float32.itemsize
        w.once(
            f"{self.name}.weight.cast",
            {self._own: size, f"{self._own}_turned": size},
            lambda: cast(weight.detach(), FORWARD, squares),
            cost=6 * weight.numel(),
        )

    def _cast(
        self, w: GraphWriter, name: str, read: str, dtype: torch.dtype, channels: int
    ) -> None:
        """Add the casts of a slot that all GEMMs read; turned only where a gradient needs it."""
        cast, block, trained = self.recipe.kernel.cast, self.recipe.format.block, self._trained
        size = channels * (1 + (0 if block is None else 4 / block[1]))
        writes = {_as_it_is(read): size} | ({_turned(read): size} if trained else {})

        def run(x: Tensor) -> Any:
            rows, turned = cast(x, dtype, block)
            rows = Cast(rows.values.view(x.shape), rows.scale)
            return (rows, turned) if trained else rows

        passes = 2 if block is None else 1
        w.compute(name, (read,), writes, run, moved=passes * w.sizes.wide(channels) + 2 * size)

    @property
    def _trained(self) -> bool:
        return self.weight.requires_grad


_TIMES = 1.8
"""How much faster GEMMs in 8 bits are: 1.91 on an H200 without the additions to fp32."""


def _as_it_is(slot: str) -> str:
    return f"{slot}_fp8"


def _turned(slot: str) -> str:
    return f"{slot}_fp8_turned"


def _rows(matrix: Cast) -> Cast:
    """A matrix [N, C] of values [..., C]."""
    return Cast(matrix.values.flatten(0, -2), matrix.scale)
