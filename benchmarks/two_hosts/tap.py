"""A transport of collectives that a benchmark can silence, and whose calls it can repeat alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_dhellam.bench.rounds import Step
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.transport import Transport
from lightning_dhellam.parallel.work import Once, Work
from lightning_dhellam.plan import Collective

_Tensors = tuple[Tensor, ...]
_Carry = Callable[[_Tensors, _Tensors], Work | None]
_Sizes = tuple[tuple[torch.Size, torch.dtype], ...]
_Calls = list[tuple[_Carry, _Sizes, _Sizes]]


class Tap:
    """Carries collectives of a lane by its transport, and those of `silent` steps not at all.

    Args:
        communicator: The communicator of the lane.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._transport: Transport = communicator.transport
        self._rank, self._ranks = communicator.rank, communicator.size
        self._is_silent = False
        self._heard: _Calls | None = None
        self._buffers: dict[tuple[_Sizes, _Sizes], tuple[_Tensors, _Tensors]] = {}

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """Gather as `Transport` does. In silence this rank's part stands for all."""
        if self._is_silent:
            out.view(self._ranks, *x.shape).copy_(x)
            return Once([])
        carry = self._transport.all_gather
        return self._carry(lambda xs, outs: carry(xs[0], outs[0]), (x,), (out,))

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """Scatter sums as `Transport` does. In silence this rank's parts are added."""
        if self._is_silent:
            torch.sum(x.view(self._ranks, *out.shape), dim=0, out=out)
            return Once([])
        carry = self._transport.reduce_scatter
        return self._carry(lambda xs, outs: carry(xs[0], outs[0]), (x,), (out,))

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> Work | None:
        """Exchange as `Transport` does. In silence it brings what is sent: sizes must be equal."""
        if self._is_silent:
            for x, out in zip(sent, received, strict=True):
                out.copy_(x)
            return Once([])
        carry = self._transport.exchange
        return self._carry(
            lambda xs, outs: carry(xs, outs, target, source), tuple(sent), tuple(received)
        )

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Work | None:
        """Deal out as `Transport` does. In silence all is zeros but what this rank keeps."""
        if self._is_silent:
            for x, out in zip(sent, received, strict=True):
                parts = out.zero_().split(list(taken))
                parts[self._rank].copy_(x.split(list(given))[self._rank])
            return Once([])
        carry = self._transport.all_to_all
        return self._carry(
            lambda xs, outs: carry(xs, outs, given, taken), tuple(sent), tuple(received)
        )

    def processors(self, collective: Collective) -> int:
        """The processors that the transport takes for a collective."""
        return self._transport.processors(collective)

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
            for carry, *sizes in heard:
                work = carry(*self._buffers[sizes[0], sizes[1]])
                if work is not None:
                    work.wait()
            return torch.zeros(())

        return run

    def _carry(self, carry: _Carry, xs: _Tensors, outs: _Tensors) -> Work | None:
        if self._heard is not None:
            sizes = _sizes(xs), _sizes(outs)
            self._heard.append((carry, *sizes))
            # Those of a size share: each is waited for before the next one.
            if sizes not in self._buffers:
                made = (tuple(torch.zeros_like(x) for x in each) for each in (xs, outs))
                self._buffers[sizes] = next(made), next(made)
        return carry(xs, outs)


def _sizes(tensors: _Tensors) -> _Sizes:
    return tuple((x.shape, x.dtype) for x in tensors)
