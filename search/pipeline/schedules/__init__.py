"""Orders in which the stages of a pipeline work, as data: ours, and those it is compared with."""

from lightning_dhellam.search.pipeline.schedules.check import check
from lightning_dhellam.search.pipeline.schedules.folded import dual_pipe_v, fold, zero_bubble_v
from lightning_dhellam.search.pipeline.schedules.straight import interleaved_1f1b, one_f_one_b
from lightning_dhellam.search.pipeline.schedules.work import (
    Part,
    Schedule,
    ScheduleError,
    Visit,
    Work,
    joined,
)

__all__ = [
    "Part",
    "Schedule",
    "ScheduleError",
    "Visit",
    "Work",
    "check",
    "dual_pipe_v",
    "fold",
    "interleaved_1f1b",
    "joined",
    "one_f_one_b",
    "zero_bubble_v",
]
