"""Sets of slots that a layer's backward may make again, of which none beats another.

A set is what is *kept* of what backward reads; the rest is made again, from what is kept, by the
operators that had made it. What those read in between is made again as well, or is kept where it is
what a gather spreads, which is narrower than what it brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from lightning_dhellam.plan import SHARED, GraphPair, Lane, Operator
from lightning_dhellam.plan.passes import CHOICES, run_again

MOST = 8
"""Candidates of a kind of layer that are looked at further."""
_GROUPS = 10
"""Operators whose results may be kept or not: with more, those of the narrowest are kept."""


@dataclass(frozen=True)
class Candidate:
    """Slots that backward makes again, and what that takes.

    Attributes:
        slots: what is made again; see `plan.passes.recompute`.
        seconds: of the operators that make them, one after the other, per token.
        saved: bytes per token that are saved with them.
    """

    slots: frozenset[str]
    seconds: float
    saved: float


def candidates(
    pair: GraphPair, seconds: Callable[[Operator], float], most: int = MOST
) -> list[Candidate]:
    """Return sets of slots, from that of which most bytes are saved to that of the fewest.

    Each takes longer than the one before it. Where there are more than `most`, those are left out
    without which the others are least far apart.

    Args:
        pair: a layer that makes nothing again.
        seconds: what an operator of forward takes, alone.
        most: how many to return at most, but for the two ends; with 0 nothing is made again.
    """
    sets = _sets(pair) if most else [frozenset[str]()]
    found = {slots: _candidate(pair, slots, seconds) for slots in sets}
    front: list[Candidate] = []
    for one in sorted(found.values(), key=lambda c: (c.saved, c.seconds, sorted(c.slots))):
        if not front or one.seconds < front[-1].seconds:
            front.append(one)
    while len(front) > max(most, 2):
        front.pop(min(range(1, len(front) - 1), key=lambda at: _distance(front, at)))
    return front[::-1]


def _sets(pair: GraphPair) -> Iterator[frozenset[str]]:
    forward = pair.forward
    yield from (choice(pair) for choice in CHOICES.values())
    sizes = forward.bytes_per_token
    groups: dict[str, set[str]] = {}
    for slot in pair.saved:
        maker = forward.producers.get(slot)
        if maker is not None and maker.lane is not Lane.HOST:
            groups.setdefault(maker.name, set()).add(slot)
    wide = sorted(groups.values(), key=lambda g: -sum(sizes[slot] for slot in g))[:_GROUPS]
    between = forward.written - {*pair.saved}
    spread = {s for o in forward.operators if o.light and o.is_communication for s in o.reads}
    for count in range(1, len(wide) + 1):
        for dropped in combinations(wide, count):
            slots = frozenset[str]().union(*dropped)
            yield slots | between
            yield slots | (between - spread)


def _candidate(
    pair: GraphPair, slots: frozenset[str], seconds: Callable[[Operator], float]
) -> Candidate:
    again = run_again(pair, slots)
    made = {slot for operator in again for slot in operator.writes}
    read = {s for o in again for s in o.reads if not s.startswith(SHARED)}
    sizes = pair.forward.bytes_per_token
    saved = sum(sizes.get(slot, 0.0) for slot in ({*pair.saved} | read) - made)
    return Candidate(frozenset(slots & made), sum(map(seconds, again)), saved)


def _distance(front: list[Candidate], at: int) -> float:
    """How far a candidate is from the two beside it."""
    before, one, after = front[at - 1 : at + 2]
    return (after.saved - before.saved) * (before.seconds - after.seconds) - abs(
        (one.saved - before.saved) * (before.seconds - one.seconds)
        - (after.saved - one.saved) * (one.seconds - after.seconds)
    )
