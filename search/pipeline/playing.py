"""Plays a schedule on the stages of a pipeline.

A stage carries out its visits in order. A visit starts when the stage is free and all it needs has
arrived; it hands a result on as soon as the strand that made it has ended, which may be before the
visit ends. A stage sends one message at a time, beside its visits:

    stage 0   |===== 0F3+3B0 =====|== 3F2 ==|
    pp             |--0F3--> |--3B0->
    stage 1                  |===== 1F3+2B1 =====
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lightning_dhellam.pipeline.schedules import Schedule, Visit, Work, done_as
from lightning_dhellam.search.pipeline.visits import VisitCost, VisitCosts


@dataclass(frozen=True)
class Link:
    """The link between neighbouring stages.

    Attributes:
        bandwidth: bytes per second that a stage can send.
        latency: seconds until the first byte arrives.
    """

    bandwidth: float = inf
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class VisitInterval:
    """A visit on the timeline of a stage, with its start and end in seconds."""

    works: Visit
    start: float
    end: float


@dataclass(frozen=True)
class StageUse:
    """How a stage spends a step: the first four times add up to the seconds of the step.

    Attributes:
        compute: seconds in which compute works.
        exposed: seconds of visits in which compute idles: their own communication is not hidden.
        transfer: seconds between visits in which what is waited for is on its way from a stage.
        bubble: the other seconds between visits, before the first, and after the last.
        peak: most saved activations at a time.
        intervals: the visits, in order.
    """

    compute: float
    exposed: float
    transfer: float
    bubble: float
    peak: float
    intervals: tuple[VisitInterval, ...]


@dataclass(frozen=True)
class PipelineRun:
    """A step as it was played: what every stage would do.

    Attributes:
        schedule: schedule that was played.
        seconds: seconds from the first visit to the end of the last.
        stages: how each stage spends the step.
    """

    schedule: Schedule
    seconds: float
    stages: tuple[StageUse, ...]

    def share(self, part: str) -> list[float]:
        """Return the share of the step that each stage spends on `part`, such as `bubble`."""
        return [getattr(stage, part) / self.seconds for stage in self.stages]


def play(schedule: Schedule, costs: VisitCosts, link: Link | None = None) -> PipelineRun:
    """Play a step of a schedule that `verify` accepts; without a `link`, transfers are free."""
    stages = [_Stage(number, schedule, costs, link or Link()) for number in range(schedule.stages)]
    arrived: dict[Work, _Message] = {}
    while sum(stage.advance(arrived) for stage in stages):
        pass
    assert all(stage.finished for stage in stages), f"{schedule.name} deadlocks"
    seconds = max(stage.free for stage in stages)
    return PipelineRun(schedule, seconds, tuple(stage.use(seconds) for stage in stages))


@dataclass(frozen=True, slots=True)
class _Message:
    """A result, when it was made, and when it arrives where it is needed, in seconds."""

    made: float
    arrives: float


class _Stage:
    """Knows how far a stage has come, and what it has spent its time on."""

    def __init__(self, number: int, schedule: Schedule, costs: VisitCosts, link: Link) -> None:
        self._number, self._visits = number, schedule.visits[number]
        self._schedule, self._costs, self._link = schedule, costs, link
        self._sending = 0.0
        self._intervals: list[VisitInterval] = []
        self._done: list[VisitCost] = []
        self._transfer = 0.0
        self.free = 0.0

    @property
    def finished(self) -> bool:
        return len(self._intervals) == len(self._visits)

    def advance(self, arrived: dict[Work, _Message]) -> int:
        """Carry out all visits that can be by now, and return how many there were."""
        first = len(self._intervals)
        while not self.finished:
            works = self._visits[len(self._intervals)]
            before = [b for work in works for b in self._schedule.before(work)]
            if not all(b in arrived for b in before):
                break
            self._do(works, [self._received(b, arrived[b]) for b in before], arrived)
        return len(self._intervals) - first

    def _received(self, work: Work, message: _Message) -> _Message:
        """Return when a message is here: a result of this stage's own is when it is made."""
        local = self._schedule.placement.stage_of[work.chunk] == self._number
        return _Message(message.made, message.made) if local else message

    def _do(self, works: Visit, needed: list[_Message], arrived: dict[Work, _Message]) -> None:
        cost = self._costs.of(works)
        start = self.free
        for message in sorted(needed, key=lambda message: message.arrives):
            if message.arrives > start:
                self._transfer += message.arrives - max(start, message.made)
                start = message.arrives
        self._intervals.append(VisitInterval(works, start, start + cost.seconds))
        self._done.append(cost)
        self.free = start + cost.seconds
        for work in sorted(works, key=lambda work: cost.ready[work.strand]):
            made = start + cost.ready[work.strand]
            arrived[done_as(work)] = _Message(made, self._sent(work, made))

    def _sent(self, work: Work, made: float) -> float:
        """Return when the result of a work is where it is needed."""
        if self._schedule.sent_to(work) is None:
            return made
        start = max(made, self._sending)
        self._sending = start + self._costs.bytes_sent(work) / self._link.bandwidth
        return self._sending + self._link.latency

    def use(self, seconds: float) -> StageUse:
        compute = sum(cost.compute for cost in self._done)
        visits = sum(cost.seconds for cost in self._done)
        return StageUse(
            compute,
            visits - compute,
            self._transfer,
            seconds - visits - self._transfer,
            self._peak(),
            tuple(self._intervals),
        )

    def _peak(self) -> float:
        saved = peak = 0.0
        for cost in self._done:
            peak = max(peak, saved + cost.rise)
            saved += cost.change
        return peak
