"""Timelines that are worked out by hand, in lists: what the machine model plays in arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_dhellam.search.model import arrays, machine

Table = Sequence[Sequence[tuple[float, float]]]


@dataclass(slots=True)
class Score:
    """Operators in an order that the machine model can play. Indices are those of one launch.

    Attributes:
        queues: launches of each lane in issue order; compute is the first lane.
        seconds: of each launch, alone.
        kinds: of each launch: its row or column in `slowdowns`.
        waits: how many launches each one waits for.
        followers: the launches that wait for each one.
        issued: when the host issues each one, None if it always is early enough.
        slowdowns: of communication and compute, by kind of communication and kind of compute.
        behind: the same for communication that starts while the compute launch is running.
        holds: the compute launches that wait for each launch to start. None: what could start
            with a compute launch goes first, as if it held it.
        looking: all launches in issue order, if the host waits for some.
        looked_at: those that it waits for.
        pace: seconds between launches that it issues.
    """

    queues: Sequence[Sequence[int]]
    seconds: Sequence[float]
    kinds: Sequence[int]
    waits: Sequence[int]
    followers: Sequence[Sequence[int]]
    issued: Sequence[float] | None
    slowdowns: Table
    behind: Table
    holds: Mapping[int, Sequence[int]] | None = None
    looking: Sequence[int] = ()
    looked_at: Sequence[int] = ()
    pace: float = 0.0


def play(score: Score) -> tuple[list[float], list[float]]:
    """Start and end of each launch."""
    holds = score.holds or {}
    starts, ends = machine.play(
        arrays.Rows.of(score.queues),
        np.array(score.seconds, float),
        np.array(score.kinds, np.int64),
        np.array(score.waits, np.int64),
        arrays.Rows.of(score.followers),
        np.full(len(score.seconds), np.inf)
        if score.looking
        else np.array(score.issued or (), float),
        np.zeros(0, np.int64),
        np.array(score.slowdowns, float),
        np.array(score.behind, float),
        arrays.Rows.of(holds.get(launch, ()) for launch in range(len(score.seconds))),
        score.holds is not None,
        np.array(score.looking, np.int64),
        np.isin(np.arange(len(score.seconds)), score.looked_at),
        score.pace,
    )
    return starts.tolist(), ends.tolist()
