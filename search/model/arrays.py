"""Arrays of launches and slots, and functions of them compiled to machine code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function to machine code, kept for the next process where there is a place."""
    try:
        kept: Callable[..., Any] = njit(cache=True)(function)
    except RuntimeError:
        # Neither the package's folder nor the user's cache can be written.
        return cast(Callable[..., Any], njit(function))
    return kept


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function be compiled into those that call it.

    A call with a few tuples of arrays would count references to every one of them.
    """
    return cast(Callable[..., Any], njit(inline="always")(function))


class Rows(NamedTuple):
    """Rows of numbers of different lengths: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Array
    offsets: Array

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Rows:
        """Make rows from sequences of numbers."""
        offsets, values = [0], list[int]()
        for row in rows:
            values.extend(row)
            offsets.append(len(values))
        return cls(np.array(values, np.int64), np.array(offsets, np.int64))
