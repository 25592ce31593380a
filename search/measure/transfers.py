"""Measured times of transfers between the stages of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transfer:
    """A message from a stage to its neighbour, which sends as much back meanwhile: a profile's row.

    Attributes:
        source: stage that sends.
        target: stage that receives.
        bytes: bytes of the message.
        seconds: seconds from its start until it is there, while neither stage computes.
        beside: seconds of the same while both compute.
        takes: share of compute that it takes meanwhile.
        spins: whether a receive takes some of it from its posting on, as kernels of NCCL do, and
            not only while bytes come.
        waits: share of compute that such a receive takes while none come; None if not measured.
    """

    source: int
    target: int
    bytes: float
    seconds: float
    beside: float
    takes: float = 0.0
    spins: bool = True
    waits: float | None = None
