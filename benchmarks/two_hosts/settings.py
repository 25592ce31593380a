"""What `python -m benchmarks.two_hosts` is told, and each of the hosts with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lightning_dhellam.bench.plans import PLANS

MEGATRON_CORE = "megatron-core"
"""Megatron-core's own model and schedule, not our plan of the same kind."""
SIDES = ("sequential", "megatron", "dhellam", "interleaved", "auto", MEGATRON_CORE)
"""What is timed unless others are asked for. `order` is not: on a host, whose processor
communication takes in any order, it is the plan of `auto`."""
_KNOWN = (*(plan for plan in PLANS if plan != "spare"), MEGATRON_CORE)
"""`spare` leaves free what a host does not have: multiprocessors."""
HEAD = 64
"""Channels of an attention head."""


@dataclass(frozen=True)
class Settings:
    """The options of `python -m benchmarks.two_hosts`."""

    rates: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Rates of the link, in Gbit/s."""

    layers: int = 4
    """Layers of the model."""

    hidden: int = 512
    """Width of the model: a multiple of 256."""

    ffn: int = 1024
    """Width of its MLP, even."""

    length: int = 256
    """Tokens of a sequence."""

    micro_batch: int = 4
    """Sequences of a micro-batch."""

    micro_batches: int = 16
    """Micro-batches to a step."""

    vocabulary: int = 2048
    """Tokens of the vocabulary."""

    rounds: int = 5
    """Rounds that count; one more comes before."""

    sides: tuple[str, ...] = SIDES
    """Plans of ours, and megatron-core."""

    def __post_init__(self) -> None:
        unknown = [side for side in self.sides if side not in _KNOWN]
        if unknown:
            raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(_KNOWN)}")
        if "sequential" not in self.sides:
            raise ValueError(
                "--sides: 'sequential' must be among them, all others are compared to it"
            )
        if self.hidden % 256:
            raise ValueError(
                f"--hidden {self.hidden} must be a multiple of 256: heads of {HEAD} on two"
            )
        counts = ("layers", "hidden", "ffn", "length", "micro_batch", "micro_batches")
        for name in (*counts, "vocabulary", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.ffn % 2:
            raise ValueError(f"--ffn {self.ffn} must be even: half for each host")
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"--rates {list(self.rates)}: each must be more than 0 Gbit/s")

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The settings whose fields `text` holds."""
        fields: dict[str, Any] = json.loads(text)
        for name in ("rates", "sides"):
            fields[name] = tuple(fields[name])
        return cls(**fields)
