"""How a step is timed, whoever trains."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_dhellam.parallel.collectives import largest

Note = Callable[[dict[str, Any]], None]
"""Called with what was measured, row by row, so that nothing is lost of it."""


class Watch:
    """Tells how long what was just done took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last time, or since this was made."""
        before, self._last = self._last, time.perf_counter()
        return self._last - before


class Side(NamedTuple):
    """What is timed.

    Attributes:
        gradients: forward and backward of a step, until the gradients are reduced. Gives the loss
            of the global batch.
        norm: the 2-norm of the whole model's gradient, which takes no time that counts.
        update: the step of the optimizer.
    """

    gradients: Callable[[], float]
    norm: Callable[[], float]
    update: Callable[[], Any]


def timed(side: Side, device: torch.device, steps: int) -> dict[str, Any]:
    """Time so many steps. Every rank must call this.

    Returns the seconds of gradients and of whole steps on the slowest rank, the memory of the
    rank that took most, and loss and norm of the last step.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_once(side, device) for _ in range(steps)]
    peak = None
    if device.type == "cuda":
        own = torch.tensor([torch.cuda.max_memory_allocated(device) / 2**30])
        peak = float(largest(own, dist.group.WORLD))
    loss, norm = times[-1][2:]
    return {
        "loss": loss,
        "grad norm": norm,
        "seconds": median(gradients for gradients, *_ in times),
        "step s": median(whole for _, whole, *_ in times),
        "steps s": [whole for _, whole, *_ in times],
        "peak GiB": peak,
    }


def _once(side: Side, device: torch.device) -> tuple[float, float, float, float]:
    dist.barrier()
    _synchronize(device)
    begin = time.perf_counter()
    loss = side.gradients()
    _synchronize(device)
    gradients = time.perf_counter() - begin
    norm = side.norm()
    _synchronize(device)
    middle = time.perf_counter()
    side.update()
    _synchronize(device)
    whole = gradients + time.perf_counter() - middle
    seconds = torch.tensor([gradients, whole], dtype=torch.float64)
    gradients, whole = largest(seconds, dist.group.WORLD).tolist()
    return gradients, whole, loss, norm


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
