"""A linear layer's GEMMs in 8 bits as operators, and what they read: casts with scales.

    step      weight.cast
    forward   cast  gemm             backward  grad.cast  dgrad  wgrad

A cast gives a matrix as it is, for one GEMM, and turned, for another: of the input `gemm` and
`wgrad`, of the gradient `dgrad` and `wgrad`, of the weight `gemm` and `dgrad`. What backward saves
is then the turned input, a byte for each number. Scales follow from the numbers alone, so that what
is made again has the same bits, whatever the plan. Weights are cast once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.fp8 import FORWARD, Cast
from lightning_dhellam.layers.fp8_formats import Fp8, check_width
from lightning_dhellam.layers.gathered_bits import GatheredBits, largest_of
from lightning_dhellam.layers.rules import on_tp, products
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan import STEP_PREFIX
from lightning_dhellam.plan.layout import Held


@dataclass(frozen=True)
class EightBits:
    """The GEMMs of one linear layer.

    Attributes:
        name: of the layer.
        weight: this rank's part [O, I].
        fp8: how they are computed.
    """

    name: str
    weight: Parameter
    fp8: Fp8

    @classmethod
    def of(cls, name: str, weight: Parameter, fp8: Fp8 | None, index: int) -> EightBits | None:
        """The GEMMs of a layer of this name in model layer `index`; None where `fp8` is."""
        if fp8 is None:
            return None
        for width in weight.shape:
            check_width(fp8.name, f"{name} of layer {index}", width)
        return cls(name, weight, fp8)

    def forward(
        self,
        w: GraphWriter,
        read: str,
        write: str,
        bias: Parameter | None,
        flops: float,
        ends: tuple[Held, Held],
    ) -> None:
        """Add `write` [..., O] from `read` [..., I], which may have been gathered in 8 bits."""
        self._cast_weight(w)
        if _as_it_is(read) not in w.bytes_per_token:
            self._cast(w, f"{self.name}.cast", read, FORWARD, self.weight.shape[1])
        multiply, outputs, dtype = self.fp8.kernel.multiply, self.weight.shape[0], w.sizes.dtype
        w.compute(
            f"{self.name}.gemm",
            (_as_it_is(read), self._own),
            {write: w.sizes.wide(outputs)},
            lambda x, weight: multiply(_rows(x), weight, dtype, bias, fast=True).view(
                *x.values.shape[:-1], outputs
            ),
            flops=flops / self.fp8.format.faster,
            fp8=self.fp8.name,
            shrinks=self.fp8.kernel.SHRINKS,
            rule=products(*ends),
        )

    def data_grad(
        self, w: GraphWriter, grad: str, write: str, flops: float, ends: tuple[Held, Held]
    ) -> None:
        """Add `write` [..., I] from the gradient in `grad` [..., O], likewise."""
        outputs, inputs = self.weight.shape
        if _as_it_is(grad) not in w.bytes_per_token:
            self._cast(w, f"{self.name}.grad.cast", grad, self.fp8.format.gradient, outputs)
        multiply, dtype = self.fp8.kernel.multiply, w.sizes.dtype
        w.compute(
            f"{self.name}.dgrad",
            (_as_it_is(grad), f"{self._own}_turned"),
            {write: w.sizes.wide(inputs)},
            lambda dy, weight: multiply(_rows(dy), weight, dtype).view(
                *dy.values.shape[:-1], inputs
            ),
            flops=flops / self.fp8.format.faster,
            fp8=self.fp8.name,
            shrinks=self.fp8.kernel.SHRINKS,
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
        accumulate, weight = self.fp8.kernel.accumulate, self.weight
        reads, written = ends

        def run(dy: Cast, x: Cast) -> None:
            first = taken_first(weight)
            accumulate(main_grad(weight), dy, x, first=first)

        w.compute(
            f"{self.name}.wgrad",
            (_turned(grad), _turned(read)),
            {},
            run,
            flops=flops / self.fp8.format.faster_weight,
            fp8=self.fp8.name,
            accumulates=(weight,),
            shrinks=self.fp8.kernel.SHRINKS,
            rule=on_tp((written, reads), gradient=along),
        )

    def gather(self, w: GraphWriter, name: str, read: str, whole: str) -> bool:
        """Add the input's gather in 8 bits by an operator of this `name`, if they travel so."""
        return self._gather(w, (self.name, name), read, whole, FORWARD, self.weight.shape[1])

    def gather_grad(self, w: GraphWriter, name: str, read: str, whole: str) -> bool:
        """Add the gradient's gather likewise."""
        names, dtype = (f"{self.name}.grad", name), self.fp8.format.gradient
        return self._gather(w, names, read, whole, dtype, self.weight.shape[0])

    def _gather(
        self,
        w: GraphWriter,
        names: tuple[str, str],
        read: str,
        whole: str,
        dtype: torch.dtype,
        channels: int,
    ) -> bool:
        fp8 = self.fp8
        if not fp8.gathers or w.sizes.tp == 1:
            return False
        block = fp8.format.block
        bits = GatheredBits(*names, fp8.name, fp8.kernel, dtype, block, channels)
        turned = _turned(whole) if self._trained else None
        bits.write(w, read, _as_it_is(read), _as_it_is(whole), turned)
        return True

    @property
    def _own(self) -> str:
        """The slot of the weight as it is."""
        return f"{STEP_PREFIX}{self.name}.weight"

    def _cast_weight(self, w: GraphWriter) -> None:
        cast, weight, squares = self.fp8.kernel.cast, self.weight, self.fp8.format.squares
        scales = 1 if squares is None else weight.numel() // prod(squares)
        size = weight.numel() + scales * torch.float32.itemsize
        w.once(
            f"{self.name}.weight.cast",
            {self._own: size, f"{self._own}_turned": size},
            lambda: cast(weight.detach(), FORWARD, squares),
            cost=6 * weight.numel(),
            fp8=self.fp8.name,
        )

    def _cast(
        self, w: GraphWriter, name: str, read: str, dtype: torch.dtype, channels: int
    ) -> None:
        """Add the casts of a slot that all GEMMs read; turned only where a gradient needs it."""
        cast, block, trained = self.fp8.kernel.cast, self.fp8.format.block, self._trained
        size = channels * (1 + (0 if block is None else 4 / block[1]))
        writes = {_as_it_is(read): size} | ({_turned(read): size} if trained else {})
        measured = self.measures and largest_of(read) in w.bytes_per_token

        def run(x: Tensor, largest: Tensor | None = None) -> Any:
            rows, turned = cast(x, dtype, block, largest)
            rows = Cast(rows.values.view(x.shape), rows.scale)
            return (rows, turned) if trained else rows

        passes = 2 if self.measures and not measured else 1
        moved = passes * w.sizes.wide(channels) + 2 * size
        reads = (read, largest_of(read)) if measured else (read,)
        w.compute(name, reads, writes, run, moved=moved, fp8=self.fp8.name)

    @property
    def measures(self) -> bool:
        """Whether casts ask for the largest number of all that they read, before they cast."""
        return self.fp8.format.block is None

    @property
    def _trained(self) -> bool:
        return self.weight.requires_grad


def _as_it_is(slot: str) -> str:
    return f"{slot}_fp8"


def _turned(slot: str) -> str:
    return f"{slot}_fp8_turned"


def _rows(matrix: Cast) -> Cast:
    """A matrix [N, C] of values [..., C], its scales of rows column by column in memory."""
    scale = matrix.scale if matrix.scale.dim() == 1 else matrix.scale.t().contiguous().t()
    return Cast(matrix.values.flatten(0, -2), scale)
