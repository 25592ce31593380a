"""How the frequency of a device falls while it computes, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import log


@dataclass(frozen=True)
class Clock:
    """How much slower operators are as compute fills more of the time.

    A device at its power limit lowers its clock: the less compute pauses, the slower it is. The
    slowdown of compute is a power of the share of time in which it works, and never below 1. A
    lower clock also slows down processors that move the bytes of a collective.

    Attributes:
        full: slowdown of compute that never pauses, at least 1.
        exponent: power to which the share of time is raised.
        communication: slowdown of communication beside compute that never pauses, at least 1.
    """

    full: float = 1.0
    exponent: float = 0.5
    communication: float = 1.0

    @classmethod
    def through(cls, full: float, paused: tuple[float, float], communication: float = 1.0) -> Clock:
        """Fit a clock to two measurements of compute.

        Args:
            full: slowdown of compute without pauses.
            paused: share of time in which compute with pauses worked, and its slowdown.
            communication: slowdown of communication beside compute without pauses.
        """
        share, slowdown = paused
        if full <= 1.0 or not 0 < share < 1:
            return cls()
        exponent = log(full / max(slowdown, 1.0)) / log(1 / share)
        return cls(full, max(exponent, 0.0), max(communication, 1.0))

    def slowdown(self, share: float) -> float:
        """Return the slowdown of compute that works for `share` of the time."""
        return float(max(1.0, self.full * min(share, 1.0) ** self.exponent))

    def slowdown_of_communication(self, share: float) -> float:
        """Return the slowdown of communication where compute works for `share` of the time.

        It lies as far between none and all as that of compute does.
        """
        if self.full <= 1.0:
            return 1.0
        return 1 + (self.communication - 1) * (self.slowdown(share) - 1) / (self.full - 1)
