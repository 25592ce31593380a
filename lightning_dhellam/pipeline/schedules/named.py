"""The schedules that have a name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_dhellam.pipeline.schedules.folded import dual_pipe_v, fold, zero_bubble_v
from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.straight import interleaved_1f1b, one_f_one_b

Scheme = Callable[[int, int], Schedule]
"""Makes a schedule of stages and micro-batches; refuses numbers with a `ScheduleError`."""

SCHEDULES: Mapping[str, Scheme] = {
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_1f1b,
    "zb-v": zero_bubble_v,
    "dualpipe-v": dual_pipe_v,
    "fold": fold,
}
"""Schedules by the names that users know."""
