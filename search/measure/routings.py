"""Times of operators whose sizes follow from values: of experts, from what the routers choose.

One routing of a run says little of the next. So these operators are timed over several of them, of
different micro-batches and layers, and an order is judged by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from statistics import fmean

from lightning_dhellam.search.measure.measuring import Bench, BenchError, Progress, Target, targets
from lightning_dhellam.search.measure.profile import Profile
from lightning_dhellam.search.measure.rows import Key, Samples


def with_routings(
    profile: Profile,
    benches: Iterable[Callable[[], Bench]],
    *,
    rounds: int = 1,
    progress: Progress | None = None,
) -> Profile:
    """Return the profile with the times of what varies, by its own routing and by further ones.

    It is the profile as it was where nothing varies, or nothing further is given.

    Args:
        profile: of one routing, with the graphs that it was measured on.
        benches: make what times operators on the values of a further routing each. The one before
            is let go first, with its values.
        rounds: as for `measure`.
        progress: is told what is measured next.

    Raises:
        BenchError: names the operator that failed.
    """
    varying = [target for target in targets(profile.graphs)[0] if target.operator.varies]
    keys = {target.key for target in varying}
    first = {
        row.operator: row.median
        for row in profile.timings
        if row.partner is None and row.operator in keys
    }
    makers = list(benches) if varying else []
    count, found = len(makers) * len(varying), [first]
    for number, make in enumerate(makers):

        def tell(index: int, key: Key, done: int = number * len(varying)) -> None:
            if progress is not None:
                progress(done + index, count, key)

        found.append(_timed(make(), varying, rounds, tell))
    if progress is not None and count:
        progress(count, count, "done")
    return replace(profile, routings=tuple(found)) if makers else profile


def _timed(
    bench: Bench, varying: list[Target], rounds: int, tell: Callable[[int, Key], None]
) -> dict[Key, float]:
    """Seconds of each target, over all rounds."""
    taken: dict[Key, list[Samples]] = {target.key: [] for target in varying}
    for index in range(rounds):
        for number, target in enumerate(varying):
            if not index:
                tell(number, f"{target.key} by another routing")
            try:
                taken[target.key].append(bench.alone(target))
            except Exception as error:
                raise BenchError(f"measuring {target.key} failed: {error}") from error
    return {
        key: Samples(tuple(chain.from_iterable(one.seconds for one in found))).quantile(0.5)
        for key, found in taken.items()
    }


def mean_of(profile: Profile) -> dict[Key, float]:
    """Return the mean seconds of each operator that varies, over the routings of a profile."""
    keys = profile.routings[0] if profile.routings else ()
    return {key: fmean(one[key] for one in profile.routings) for key in keys}


def range_of(profile: Profile) -> tuple[float, float] | None:
    """Return the least and the most time of all that varies, by one routing, in its mean.

    None where nothing varies.
    """
    totals = [sum(one.values()) for one in profile.routings]
    if not totals:
        return None
    mean = fmean(totals)
    return min(totals) / mean, max(totals) / mean
