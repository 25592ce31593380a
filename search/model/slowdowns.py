"""How much operators slow each other down, from their times alone and beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_dhellam.plan import Lane
from lightning_dhellam.search.measure import Key, Profile

_INSTANT = 1e-7
"""Seconds that anything takes at least."""
_SLOWEST = 20.0
"""A measured slowdown above this is taken for an accident of measurement."""
Slowdowns = Mapping[tuple[Key, Key], tuple[float, float]]
_Run = tuple[tuple[float, float], tuple[float, float]]
"""Seconds of a communication and of what ran beside it: alone, and started together."""


def slowdowns(
    profile: Profile, alone: Mapping[Key, float], *, led: bool
) -> dict[tuple[Key, Key], tuple[float, float]]:
    """Return how much two operators slow each other down, by their keys.

    The first is a communication, the second compute or a communication of another lane. `alone`
    are the seconds of each key while nothing else runs. `led` picks the rows in which computation
    was ahead, or else those in which both began at once.
    """
    rows = {
        (row.operator, row.partner): row
        for row in profile.timings
        if row.partner is not None and bool(row.lead) is led
    }
    runs: dict[tuple[Key, Key], _Run] = {}
    for (communication, other), row in rows.items():
        if other is not None and profile.lanes[communication] is not Lane.COMPUTE:
            beside = rows[other, communication]
            runs[communication, other] = (
                (alone[communication], max(alone[other] - row.lead, _INSTANT)),
                (row.median, max(beside.median - row.lead, _INSTANT)),
            )
    found = {pair: slowdown_of([run]) for pair, run in runs.items()}
    return found | _on_the_host(runs, profile.lanes) if profile.inline else found


def _on_the_host(
    runs: Mapping[tuple[Key, Key], _Run], lanes: Mapping[Key, Lane]
) -> dict[tuple[Key, Key], tuple[float, float]]:
    """Return the slowdowns of each communication and of any compute, where both run on the host.

    The processor's time that communication takes does not depend on what computes meanwhile. Most
    of it is at the beginning, so that compute which ends before it would seem to be slowed more.
    """
    of_each: dict[Key, dict[tuple[Key, Key], _Run]] = {}
    for pair, run in runs.items():
        if lanes[pair[1]] is Lane.COMPUTE:
            of_each.setdefault(pair[0], {})[pair] = run
    found: dict[tuple[Key, Key], tuple[float, float]] = {}
    for own in of_each.values():
        outlasted = [run for run in own.values() if run[1][0] <= run[1][1]]
        found |= dict.fromkeys(own, slowdown_of(outlasted or own.values()))
    return found


def slowdown_of(runs: Iterable[_Run]) -> tuple[float, float]:
    """Return the slowdowns of two operators from their times alone and started together.

    They disturb each other until one of them ends. In that time the one that ends first does all
    of its work, and the other what it did not have to do alone afterwards. Of several runs the
    times and the work are summed.
    """
    shared, done = 0.0, [0.0, 0.0]
    for alone, together in runs:
        meanwhile = min(together)
        shared += meanwhile
        for x in range(2):
            done[x] += alone[x] - (together[x] - meanwhile)
    factors = (shared / work if work > 0 else _SLOWEST for work in done)
    low, high = (min(max(factor, 1.0), _SLOWEST) for factor in factors)
    return low, high
