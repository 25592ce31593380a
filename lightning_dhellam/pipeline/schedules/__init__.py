"""Orders in which the stages of a pipeline work, as data: what they are, and those with names."""

from lightning_dhellam.pipeline.schedules.folded import dual_pipe_v, fold, zero_bubble_v
from lightning_dhellam.pipeline.schedules.named import (
    AUTO,
    SCHEDULES,
    Found,
    Scheme,
    begun,
    check_placed,
    content,
    counts_of,
    kept,
    named,
    placed,
    placement_of,
    playable,
    restored,
    scheme_of,
)
from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.straight import interleaved_1f1b, one_f_one_b
from lightning_dhellam.pipeline.schedules.verify import sends_ahead, verify
from lightning_dhellam.pipeline.schedules.walks import Walk, walks
from lightning_dhellam.pipeline.schedules.work import (
    LIVE,
    Part,
    ScheduleError,
    Visit,
    Work,
    done_as,
    live_activations,
    one,
    peak_activations,
    shown,
)
from lightning_dhellam.plan.placement import Edge, Placement

__all__ = [
    "AUTO",
    "LIVE",
    "SCHEDULES",
    "Edge",
    "Found",
    "Part",
    "Placement",
    "Schedule",
    "ScheduleError",
    "Scheme",
    "Visit",
    "Walk",
    "Work",
    "begun",
    "check_placed",
    "content",
    "counts_of",
    "done_as",
    "dual_pipe_v",
    "fold",
    "interleaved_1f1b",
    "kept",
    "live_activations",
    "named",
    "one",
    "one_f_one_b",
    "peak_activations",
    "placed",
    "placement_of",
    "playable",
    "restored",
    "scheme_of",
    "sends_ahead",
    "shown",
    "verify",
    "walks",
    "zero_bubble_v",
]
