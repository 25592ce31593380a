"""What `dhellam bench overlap` measures: shapes, links, and the order of the cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.parallel import Link

PUBLISHED_EXPOSED = 5.4 / 16.5
"""Share of compute that Megatron exposes on 8 H200 for shape b: 21.9 - 16.5 of 16.5 ms a layer."""
_LINK = re.compile(r"(?:copy|(?P<sms>\d+)sm):(?P<bandwidth>\d+(?:\.\d+)?)")
_UNUSED_VOCABULARY = 512
SLOWER = 1000
"""Times that links are slower in a rehearsal, as its layers are smaller."""


@dataclass(frozen=True)
class Shape:
    """Layers as wide as those of a model, on one rank of a tensor-parallel group.

    Attributes:
        config: of the model; the vocabulary is not used.
        length: tokens of a sequence.
        micro_batch: sequences that go through the layers together.
        ranks: tensor-parallel size.
    """

    config: ModelConfig
    length: int
    micro_batch: int
    ranks: int


def shapes(rehearse: bool) -> dict[str, Shape]:
    """By letter, as in the published tables; miniatures to rehearse with."""
    if rehearse:
        config = ModelConfig(8, 64, 128, 8, 8, _UNUSED_VOCABULARY, max_sequence_length=64)
        return {"a": Shape(config, 64, 1, 8), "b": Shape(config, 32, 2, 8)}
    llama = preset("llama-3-70b", vocab_size=_UNUSED_VOCABULARY)
    qwen = replace(
        llama,
        hidden_size=5120,
        ffn_hidden_size=17408,
        num_attention_heads=40,
        num_query_groups=8,
        head_dim=128,
    )
    return {"a": Shape(llama, 8192, 1, 8), "b": Shape(qwen, 8192, 4, 8)}


@dataclass(frozen=True)
class Cell:
    """One shape over one link.

    Attributes:
        shape: its letter.
        layers: of the model.
        link: over which tensor-parallel ranks talk.
        calibrated: choose the link's bandwidth so that Megatron exposes what was published.
        priority: of the communication streams.
        lever: what is unusual about it, in words.
    """

    shape: str
    layers: int
    link: Link
    calibrated: bool = False
    priority: int = -1
    lever: str = ""

    @property
    def name(self) -> str:
        """Short, for tables and files."""
        rate = "calibrated" if self.calibrated else f"{self.link.bandwidth / 1e9:g}"
        manner = f"{self.link.sms}sm" if self.link.sms else "copy"
        lever = f" {self.lever}" if self.lever else ""
        return f"{self.shape}{self.layers} {manner}:{rate}{lever}"

    @property
    def file_name(self) -> str:
        """The name without what file names should not have."""
        return self.name.replace(" ", "-").replace(":", "-")


def parse_link(text: str) -> Link:
    """`copy:110` for a copy engine at 110 GB/s, `16sm:200` for 16 SMs at 200 GB/s.

    Raises:
        ValueError: it is written otherwise.
    """
    match = _LINK.fullmatch(text)
    if match is None:
        raise ValueError(
            f"link '{text}': write copy:110 for a copy engine at 110 GB/s, or 16sm:200 for 16 SMs"
            " at 200 GB/s"
        )
    return Link(float(match["bandwidth"]) * 1e9, sms=int(match["sms"] or 0))


def cells(links: Sequence[Link], *, calibrate: bool, levers: bool) -> list[Cell]:
    """The most important first: a with 4 layers, b, a with 8 layers, then the levers."""
    found = [Cell("a", 4, link) for link in links]
    manners = dict.fromkeys(link.sms for link in links)
    if calibrate:
        found += [Cell("b", 4, _some(links, sms), calibrated=True) for sms in manners]
    found += [Cell("a", 8, link) for link in links]
    if levers:
        found += _levers(links)
    return found


def _some(links: Sequence[Link], sms: int) -> Link:
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
