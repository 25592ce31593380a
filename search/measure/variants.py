"""Profiles made from profiles: merged ones, and what the same measurement could have given."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from statistics import median

from lightning_dhellam.files import differences
from lightning_dhellam.search.measure.profile import Profile
from lightning_dhellam.search.measure.rows import Key, Timing


def merged(profiles: Sequence[Profile]) -> Profile:
    """Make one profile from several of the same graphs: of each time the median of what they say.

    Raises:
        ValueError: there are none, or they were not measured under the same conditions.
    """
    if not profiles:
        raise ValueError("there is no profile to merge: measure at least one")
    first = profiles[0]
    found = [
        name
        for other in profiles
        for name in differences(asdict(first.fingerprint), asdict(other.fingerprint))
    ]
    if found:
        raise ValueError(f"profiles of different conditions cannot be merged: {'; '.join(found)}")
    rows: dict[tuple[Key, Key | None, bool], list[Timing]] = {}
    for row in chain(*(profile.timings for profile in profiles)):
        rows.setdefault((row.operator, row.partner, row.lead > 0), []).append(row)
    timings = (
        replace(
            same[0],
            median=median(row.median for row in same),
            p20=median(row.p20 for row in same),
            p80=median(row.p80 for row in same),
            lead=median(row.lead for row in same),
        )
        for same in rows.values()
    )
    routings = zip(*(profile.routings for profile in profiles), strict=False)
    seconds = tuple({key: median(own[key] for own in same) for key in same[0]} for same in routings)
    return replace(first, timings=tuple(timings), routings=seconds)


def perturbed(profile: Profile, draw: Callable[[], float]) -> Profile:
    """Make a profile that the same measurement could have given: each time drawn from its spread.

    `draw` returns numbers from 0 to 1.
    """

    def again(row: Timing) -> Timing:
        value = row.p20 + draw() * (row.p80 - row.p20)
        return replace(row, median=value)

    return replace(profile, timings=tuple(again(row) for row in profile.timings))


def spread(profile: Profile, count: int) -> list[Profile]:
    """Make `count` profiles that the same measurement could have given, covering its spread.

    Each time is drawn once from every part of its spread, in an order of its own. The same profile
    gives the same ones.
    """
    draw = random.Random(0)
    strata = [draw.sample(range(count), count) for _ in profile.timings]
    return [
        perturbed(profile, iter([(row[number] + 0.5) / count for row in strata]).__next__)
        for number in range(count)
    ]
