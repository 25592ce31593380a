"""A transport of collectives that a benchmark can silence, and whose calls it can repeat alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dhellam.bench.rounds import Step
from lightning_dhellam.parallel.collectives import Transport
from lightning_dhellam.parallel.work import Once, Work

_Carry = Callable[[Tensor, Tensor], Work | None]
_Sizes = tuple[torch.Size, torch.Size, torch.dtype]
_Calls = list[tuple[_Carry, _Sizes]]


class Tap:
    """Carries collectives over `transport`, and those of `silent` steps not at all.

    Args:
        transport: of real collectives.
        ranks: that take part in one.
    """

    def __init__(self, transport: Transport, ranks: int) -> None:
        self._transport = transport
        self._ranks = ranks
        self._is_silent = False
        self._heard: _Calls | None = None
        self._buffers: dict[_Sizes, tuple[Tensor, Tensor]] = {}

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to fill `out` [ranks * n, ...] with `x` [n, ...] of every rank."""
        if self._is_silent:
            out.view(self._ranks, *x.shape).copy_(x)
            return Once([])
        return self._carry(self._transport.all_gather, x, out)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to sum this rank's part of `x` [ranks * n, ...] over all ranks into `out`."""
        if self._is_silent:
            torch.sum(x.view(self._ranks, *out.shape), dim=0, out=out)
            return Once([])
        return self._carry(self._transport.reduce_scatter, x, out)

    def silent(self, step: Step) -> Step:
        """The same step with collectives that send nothing: a rank's own numbers stand for all.

        What they copy and add on this rank they still do.
        """

        def run() -> Tensor:
            self._is_silent = True
            try:
                return step()
            finally:
                self._is_silent = False

        return run

    def alone(self, step: Step) -> Step:
        """The collectives of `step`, which is done once, one by one and without anything else."""
        heard: _Calls = []
        self._heard = heard
        try:
            step()
        finally:
            self._heard = None

        def run() -> Tensor:
            for carry, sizes in heard:
                work = carry(*self._buffers[sizes])
                if work is not None:
                    work.wait()
            return torch.zeros(())

        return run

    def _carry(self, carry: _Carry, x: Tensor, out: Tensor) -> Work | None:
        if self._heard is not None:
            sizes = (x.shape, out.shape, x.dtype)
            self._heard.append((carry, sizes))
            # Those of a size share: each is waited for before the next one.
            if sizes not in self._buffers:
                self._buffers[sizes] = torch.zeros_like(x), torch.zeros_like(out)
        return carry(x, out)
