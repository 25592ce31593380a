"""Finds the link over which a step takes a wanted time."""

from __future__ import annotations

from collections.abc import Callable

_CLOSE = 0.01
"""The relative error at which a value counts as reached."""


def find_rising(
    value: Callable[[float], float],
    target: float,
    start: float,
    steps: int = 10,
    lowest: float = 0.0,
) -> float:
    """Where a noisy function that rises with its positive argument is `target`, within 1%.

    Doubles or halves until the target lies between two arguments, and then draws straight lines
    between them. Measures at most `steps` times, at `lowest` or above, and returns the closest
    argument.
    """
    low = high = None
    tried: dict[float, float] = {}
    at = max(start, lowest)
    for _ in range(steps):
        tried[at] = value(at)
        if abs(tried[at] - target) <= _CLOSE * target:
            break
        if tried[at] < target:
            low = at
        else:
            high = at
        if low is None or high is None:
            at = at * 2 if high is None else max(at / 2, lowest)
            if at in tried:
                break
        else:
            share = (target - tried[low]) / (tried[high] - tried[low])
            # Not at the very ends, where a straight line may stay for long.
            at = low + min(max(share, 0.1), 0.9) * (high - low)
    return min(tried, key=lambda x: abs(tried[x] - target))
