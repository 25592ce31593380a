"""What a layer may do for memory: sets of slots made again or on the host, none beaten by another.

What is made again is chosen by what is *kept* of what backward reads; the rest is made again, from
what is kept, by the operators that had made it. What those read in between is made again as well,
or is kept where it is what a gather spreads, which is narrower than what it brings. Of what is kept
some may wait in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from lightning_dhellam.plan import SHARED, GraphPair, Lane, Operator
from lightning_dhellam.plan.offloading import ALL, movable
from lightning_dhellam.plan.passes import CHOICES, recompute, run_again

MOST = 8
"""Candidates of a kind of layer that are looked at further."""
_MORE, _ROUGHLY = 12, 24
"""The same, where slots may wait in host memory as well: when played, and before."""
_GROUPS = 10
"""Operators whose results may be kept or not: with more, those of the narrowest are kept."""
_NARROW = 1 / 8
"""Slots narrower than so much of a layer's input are not worth a copy."""
_ROOMS = (1.0, 0.5)
"""Shares of what a layer hides, that the copies of a candidate take at most."""
_DISTURBING = 0.02
"""Of what is hidden, what it is taken to cost: copies share the device's memory."""


@dataclass(frozen=True)
class Candidate:
    """Slots that backward makes again, slots that wait on the host, and what that takes.

    Attributes:
        slots: what is made again; see `plan.passes.recompute`.
        seconds: of the operators that make them, one after the other, and of copies what cannot be
            hidden, as far as the layer alone tells.
        saved: bytes per token that are saved with them on the device.
        away: saved slots that wait in host memory; see `plan.offloading.offload`.
        hosted: bytes per token of those.
    """

    slots: frozenset[str]
    seconds: float
    saved: float
    away: frozenset[str] = frozenset()
    hosted: float = 0.0


@dataclass(frozen=True)
class Hiding:
    """What hides copies to and from the host.

    Attributes:
        seconds: of a copy of so many bytes per token, the longer of both ways.
        beside: seconds that a layer computes, forward and backward, when it makes nothing again.
    """

    seconds: Callable[[float], float]
    beside: float


def candidates(
    pair: GraphPair,
    seconds: Callable[[Operator], float],
    most: int = MOST,
    hiding: Hiding | None = None,
) -> list[Candidate]:
    """Return candidates, from that of which most bytes are saved to that of the fewest.

    Each takes longer than the one before it, of those with copies and of those without. Where there
    are more than `most`, those are left out without which the others are least far apart.

    Args:
        pair: a layer that makes nothing again.
        seconds: what an operator of forward takes, alone.
        most: how many to return at most, but for the two ends; with 0 nothing is made again, and
            nothing waits on the host.
        hiding: what hides copies to the host; None where all stays on the device.
    """
    sets = _sets(pair) if most else [frozenset[str]()]
    made = dict.fromkeys(sets)
    front = _front((_candidate(pair, slots, seconds) for slots in made), most)
    if hiding is None or not most:
        return front
    copied = _front((o for one in front for o in _with_copies(pair, one, hiding)), _ROUGHLY)
    return sorted((*front, *copied), key=lambda one: -one.saved)


def narrowed(found: Sequence[Candidate], played: Callable[[int], float]) -> list[Candidate]:
    """Return candidates which none beats when they are played, in order.

    Those without copies stay: where a strand is alone, copies hide less than beside another.

    Args:
        found: from that which does nothing on.
        played: seconds of a layer with the candidate of a number.
    """
    alone = played(0)
    known = [
        replace(one, seconds=max(0.0, played(n) - alone) + _DISTURBING * one.seconds)
        for n, one in enumerate(found)
    ]
    computed = [one for one in known if not one.away]
    kept = {(one.slots, one.away): one for one in (*computed, *_front(known, _MORE))}
    return sorted(kept.values(), key=lambda one: -one.saved)


def _front(found: Iterable[Candidate], most: int) -> list[Candidate]:
    """Return those which none beats, in order, and of them `most`."""
    front: list[Candidate] = []
    for one in sorted(found, key=lambda c: (c.saved, c.seconds, sorted(c.slots), sorted(c.away))):
        if not front or one.seconds < front[-1].seconds:
            front.append(one)
    while len(front) > max(most, 2):
        front.pop(min(range(1, len(front) - 1), key=lambda at: _distance(front, at)))
    return front[::-1]


def _with_copies(pair: GraphPair, one: Candidate, hiding: Hiding) -> Iterator[Candidate]:
    """Give the same candidate with slots on the host: all, or what the layer hides of them."""
    again = recompute(pair, one.slots)
    sizes = pair.forward.bytes_per_token
    least = _NARROW * sum(sizes.get(slot, 0.0) for slot in pair.forward.inputs)
    slots = [slot for slot in movable(again, ALL) if sizes.get(slot, 0.0) >= max(least, 1e-9)]
    slots.sort(key=lambda slot: -sizes[slot])
    beside = hiding.beside + one.seconds
    for away in dict.fromkeys(
        (frozenset(slots), *(_within(slots, sizes, share * beside, hiding) for share in _ROOMS))
    ):
        hosted = sum(sizes[slot] for slot in away)
        if away:
            copying = hiding.seconds(hosted)
            exposed = max(0.0, copying - beside) + _DISTURBING * copying
            yield replace(
                one,
                seconds=one.seconds + exposed,
                saved=one.saved - hosted,
                away=away,
                hosted=hosted,
            )


def _within(
    slots: Iterable[str], sizes: Mapping[str, float], room: float, hiding: Hiding
) -> frozenset[str]:
    """Return the widest slots whose copies take no longer than `room`."""
    taken: list[str] = []
    for slot in slots:
        if hiding.seconds(sum(sizes[s] for s in (*taken, slot))) <= room:
            taken.append(slot)
    return frozenset(taken)


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
