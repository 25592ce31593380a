"""Gathers of matrices in 8 bits: ranks cast their tokens, and send a byte for each number.

    one scale   largest  largest.gather  cast  gather  turn
    blocks                               cast  gather  turn

One scale is that of the largest number of all ranks, so that what is gathered has the bits of a
cast of what would have been gathered. Rows of blocks take their scales with them; for the weight's
gradient, whose blocks lie along the tokens, they are rounded a second time when they are turned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dhellam.kernels.fp8 import Block, Cast
from lightning_dhellam.kernels.protocols import Fp8Kernel
from lightning_dhellam.layers.rules import gathers, on_tp
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import Held

_FP32 = 4.0


@dataclass(frozen=True)
class GatheredBits:
    """A gather over tensor-parallel ranks, along the sequence.

    Attributes:
        name: of the linear layer and the direction, which the operators' names begin with.
        gather: name of the gather itself.
        fp8: of the format.
        kernel: what casts and turns.
        dtype: of 8 bits.
        block: of numbers that share a scale.
        channels: of each token.
    """

    name: str
    gather: str
    fp8: str
    kernel: Fp8Kernel
    dtype: torch.dtype
    block: Block
    channels: int

    def write(self, w: GraphWriter, read: str, cast: str, whole: str, turned: str | None) -> None:
        """Add `whole`, every token's numbers in 8 bits, from `read` [s, B, C] by way of `cast`.

        `turned` is the slot of the same turned, or None where no gradient needs it.
        """
        cast_rows, dtype, block = self.kernel.cast_rows, self.dtype, self.block
        size, own = self._size, w.sizes.wide(self.channels) / w.sizes.tp
        largest = self._agree(w, read, own) if block is None else None

        def run(x: Tensor, most: Tensor | None = None) -> Cast:
            rows = cast_rows(x, dtype, block, most)
            return Cast(rows.values.view(x.shape), rows.scale)

        w.compute(
            f"{self.name}.cast",
            (read,) if largest is None else (read, largest),
            {cast: size / w.sizes.tp},
            run,
            moved=own + size / w.sizes.tp,
            fp8=self.fp8,
            rule=_CASTS if largest is None else _CASTS_BY_ALL,
        )
        w.collective(
            Lane.TP,
            self.gather,
            (cast,),
            {whole: size},
            _gathered,
            Collective.ALL_GATHER,
            gathers(Lane.TP, Held.SEQUENCE),
            crossing=size - size / w.sizes.tp,
            light=True,
        )
        if turned is not None:
            w.compute(
                f"{self.name}.turn",
                (whole,),
                {turned: size},
                self._turn(),
                moved=2 * size,
                fp8=self.fp8,
            )

    def _agree(self, w: GraphWriter, read: str, own: float) -> str:
        """Add the largest numbers of all ranks. Returns their slot."""
        slot = largest_of(read)
        w.compute(
            f"{self.name}.largest",
            (read,),
            {slot: 0.0},
            self.kernel.largest,
            moved=own,
            fp8=self.fp8,
            rule=_CASTS,
        )
        w.collective(
            Lane.TP,
            f"{self.name}.largest.gather",
            (slot,),
            {f"{slot}_all": 0.0},
            collectives.all_gather,
            Collective.ALL_GATHER,
            gathers(Lane.TP, Held.SEQUENCE),
            crossing=0.0,
        )
        return f"{slot}_all"

    def _turn(self) -> Callable[[Cast], Cast]:
        turn = self.kernel.turn
        return lambda matrix: turn(Cast(matrix.values.flatten(0, -2), matrix.scale))

    @property
    def _size(self) -> float:
        """Bytes of a token."""
        return self.channels * (1 + (0 if self.block is None else _FP32 / self.block[1]))


def largest_of(slot: str) -> str:
    """Where what made a slot leaves the largest numbers of its parts, if casts ask for them."""
    return f"{slot}_largest"


_CASTS = on_tp(Held.SEQUENCE, Held.SEQUENCE)
_CASTS_BY_ALL = on_tp((Held.SEQUENCE, Held.REPLICATED), Held.SEQUENCE)


def _gathered(communicator: Communicator, matrix: Cast) -> collectives.Pending:
    """The rows of every rank, and the scales of rows; one scale is the same on all of them."""
    values, scale = matrix
    bits = values.view(torch.uint8)  # which every transport carries
    if scale.dim() == 1:
        found, work = collectives.all_gather(communicator, bits)
        return collectives.Pending(Cast(found.view(values.dtype), scale), work)
    (found, scales), work = collectives.all_gather(communicator, bits, scale)
    return collectives.Pending(Cast(found.view(values.dtype), scales), work)
