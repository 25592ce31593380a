"""Questions that ranks ask each other in host memory, so that no device is waited for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist

ReduceOp = dist.ReduceOp


class Question:
    """Numbers of which every rank gets the sum, or the largest, of all ranks.

    It is asked at once and answered when all ranks have asked it, all in the same order.

    Args:
        numbers: of this rank, exact as floats of 64 bits.
        group: of all ranks, for tensors in host memory; None where there are no others.
        operation: what becomes of them.
    """

    def __init__(
        self,
        numbers: Sequence[float],
        group: dist.ProcessGroup | None,
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.MAX,
    ) -> None:
        # Of Python, whose reading is none of a tensor.
        self._numbers = array("d", numbers)
        self._work: dist.Work | None = None
        if group is not None:
            shared = torch.frombuffer(self._numbers, dtype=torch.float64)
            self._work = dist.all_reduce(shared, operation, group=group, async_op=True)

    def answer(self) -> array[float]:
        """The numbers of all ranks, once all of them have asked."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._numbers
