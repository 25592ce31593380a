"""The cells of `dhellam bench overlap`: a shape over a link each, in the order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_dhellam.parallel import Link

PUBLISHED_EXPOSED = 5.4 / 16.5
"""Share of compute that Megatron exposes on 8 H200 for shape b: 21.9 - 16.5 of 16.5 ms a layer."""


@dataclass(frozen=True)
class Cell:
    """One row of the benchmark: a shape over a link.

    Attributes:
        shape: The letter of the shape.
        layers: Layers of the model.
        link: The link over which tensor-parallel ranks talk.
        calibrated: Whether to choose the link's bandwidth so that Megatron's order exposes what
            was published.
        priority: The priority of communication streams, on CUDA.
        lever: What is unusual about the cell, in words.
    """

    shape: str
    layers: int
    link: Link
    calibrated: bool = False
    priority: int = -1
    lever: str = ""

    @property
    def name(self) -> str:
        """A short name, for tables and files."""
        rate = "calibrated" if self.calibrated else f"{self.link.bandwidth / 1e9:g}"
        manner = f"{self.link.sms}sm" if self.link.sms else "copy"
        lever = f" {self.lever}" if self.lever else ""
        return f"{self.shape}{self.layers} {manner}:{rate}{lever}"

    @property
    def file_name(self) -> str:
        """The name without what file names should not have."""
        return self.name.replace(" ", "-").replace(":", "-")

    @property
    def without_lever(self) -> tuple[object, ...]:
        """What this cell and the same one with another lever have in common."""
        return self.shape, self.layers, self.calibrated, self.link.bandwidth, bool(self.link.sms)


def cells(links: Sequence[Link], *, calibrate: bool, levers: bool) -> list[Cell]:
    """The most important cells first: a with 4 layers, b, a with 8 layers, then the levers."""
    found = [Cell("a", 4, link) for link in links]
    manners = dict.fromkeys(link.sms for link in links)
    if calibrate:
        found += [Cell("b", 4, _first(links, sms), calibrated=True) for sms in manners]
    found += [Cell("a", 8, link) for link in links]
    if levers:
        found += _levers(links)
    return found


def _first(links: Sequence[Link], sms: int) -> Link:
    return next(link for link in links if link.sms == sms)


def _levers(links: Sequence[Link]) -> list[Cell]:
    """What may pay besides order, on the link on SMs that is in the middle."""
    on_sms = sorted((link for link in links if link.sms), key=lambda link: link.bandwidth)
    if not on_sms:
        return []
    link = on_sms[len(on_sms) // 2]
    return [
        Cell("a", 4, link, priority=0, lever="streams of equal priority"),
        Cell("a", 4, replace(link, sms=8), lever="8 SMs"),
        Cell("a", 4, replace(link, sms=24), lever="24 SMs"),
    ]
