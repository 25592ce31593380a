"""The cells of `dhellam bench overlap`: a shape over a link each, in the order of importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_dhellam.parallel import Link
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.by_layer import AUTO, USUAL

PUBLISHED_EXPOSED = 5.4 / 16.5
"""Share of compute that Megatron exposes on 8 H200 for shape b: 21.9 - 16.5 of 16.5 ms a layer."""


@dataclass(frozen=True)
class Cell:
    """One row of the benchmark: a shape over a link.

    Attributes:
        shape: The letter of the shape.
        layers: Layers of the model.
        link: The link over which tensor-parallel ranks talk, or those of another lane.
        calibrated: Whether to choose the link's bandwidth so that Megatron's order exposes what
            was published.
        context_link: The link over which context-parallel ranks talk; None where sequences are not
            shared.
        exchange: How keys and values come to those ranks.
        lane: Whose link `link` is.
        priority: The priority of communication streams, on CUDA.
        lever: What is unusual about the cell, in words.
        recompute: What backward makes again: a choice, or `auto:` and the share of the activation
            memory that a step needs which keeps all.
        fp8: How linear layers compute in 8 bits; None where they do not.
        fp8_all_gather: Whether what they gather travels so.
    """

    shape: str
    layers: int
    link: Link
    calibrated: bool = False
    context_link: Link | None = None
    exchange: str = "ring"
    lane: Lane = Lane.TP
    priority: int = -1
    lever: str = ""
    recompute: str = USUAL
    fp8: str | None = None
    fp8_all_gather: bool = False

    @property
    def eight_bits(self) -> dict[str, Any]:
        """The same as `lower` is told."""
        return {"fp8": self.fp8, "fp8_all_gather": self.fp8_all_gather}

    @property
    def share(self) -> float | None:
        """The share of activation memory into which it is to fit; None where a choice was given."""
        auto, _, share = self.recompute.partition(":")
        return float(share) if auto == AUTO else None

    @property
    def name(self) -> str:
        """A short name, for tables and files."""
        rate = f"{_manner(self.link)}:calibrated" if self.calibrated else _spell(self.link)
        lever = f" {self.lever}" if self.lever else ""
        context = ""
        if self.context_link is not None:
            context = f" {self.exchange} {_spell(self.context_link)}"
        again = "" if self.recompute == USUAL else f" {self.recompute}"
        fp8 = f" {self.fp8}" if self.fp8 else ""
        gathers = " fp8_all_gather" if self.fp8_all_gather else ""
        return f"{self.shape}{self.layers} {rate}{context}{lever}{again}{fp8}{gathers}"

    @property
    def processors(self) -> int:
        """Multiprocessors that a collective takes at most."""
        return max(self.link.sms, self.context_link.sms if self.context_link else 0)

    @property
    def file_name(self) -> str:
        """The name without what file names should not have."""
        return self.name.replace(" ", "-").replace(":", "-")

    @property
    def without_lever(self) -> tuple[object, ...]:
        """What this cell and the same one with another lever have in common."""
        link = self.link.bandwidth, bool(self.link.sms)
        bits = self.eight_bits.values()
        return self.shape, self.layers, self.calibrated, *link, self.recompute, *bits


def _manner(link: Link) -> str:
    return f"{link.sms}sm" if link.sms else "copy"


def _spell(link: Link) -> str:
    return f"{_manner(link)}:{link.bandwidth / 1e9:g}"


def cells(
    links: Sequence[Link],
    *,
    calibrate: bool,
    levers: bool,
    context_links: Sequence[Link] = (),
    expert_links: Sequence[Link] = (),
) -> list[Cell]:
    """The most important cells first: a with 4 layers, b, a with 8 layers, then the levers.

    Behind them come c and d, whose sequences are shared, with a link between tensor-parallel ranks
    of the same manner as that of `context_links`. The last is m, whose experts are spread over
    ranks.
    """
    found = [Cell("a", 4, link) for link in links]
    manners = dict.fromkeys(link.sms for link in links)
    if calibrate:
        found += [Cell("b", 4, _first(links, sms), calibrated=True) for sms in manners]
    found += [Cell("a", 8, link) for link in links]
    if levers:
        found += _levers(links)
    spread = [Cell("m", 4, link, lane=Lane.EP) for link in expert_links]
    return found + _shared(links, context_links) + spread


def _shared(links: Sequence[Link], context_links: Sequence[Link]) -> list[Cell]:
    """Both ways for keys over each link, of wide and of grouped ones."""
    found = []
    for context_link in context_links:
        alike = [link for link in links if bool(link.sms) is bool(context_link.sms)]
        for link in alike[:1]:
            found += [
                Cell(shape, 4, link, context_link=context_link, exchange=exchange)
                for shape in ("c", "d")
                for exchange in ("ring", "all_gather")
            ]
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
