"""Plays a schedule on the stages of a pipeline.

A stage carries out its passes in order. A pass starts when the stage is free and all it needs has
arrived; it hands a result on as soon as the strand that made it has ended, which may be before the
pass ends. A stage sends one message at a time, beside its passes:

    stage 0   |===== 0F3+3B0 =====|== 3F2 ==|
    pp             |--0F3--> |--3B0->
    stage 1                  |===== 1F3+2B1 =====
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from lightning_dhellam.search.pipeline.passes import PassCost, PassCosts
from lightning_dhellam.search.pipeline.schedules import Pass, Schedule, Work
from lightning_dhellam.search.pipeline.schedules.work import done_as


@dataclass(frozen=True)
class Link:
    """What connects the stages.

    Attributes:
        bandwidth: bytes per second that a stage can send.
        latency: seconds until the first byte arrives.
    """

    bandwidth: float = inf
    latency: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """A pass on the timeline of a stage, in seconds."""

    works: Pass
    start: float
    end: float


@dataclass(frozen=True)
class StageUse:
    """How a stage spends the step. Its first four add up to the step's seconds.

    Attributes:
        compute: seconds in which compute works.
        exposed: seconds of passes in which compute idles: their own communication is not hidden.
        transfer: seconds between passes in which what is waited for is on its way from a stage.
        bubble: the other seconds between passes, before the first, and after the last.
        peak: most saved activations at a time.
        spans: the passes, in order.
    """

    compute: float
    exposed: float
    transfer: float
    bubble: float
    peak: float
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class PipelineRun:
    """What a step would do on every stage.

    Attributes:
        schedule: that was played.
        seconds: of the step, from the first pass to the end of the last.
        stages: one after the other.
    """

    schedule: Schedule
    seconds: float
    stages: tuple[StageUse, ...]

    def share(self, part: str) -> list[float]:
        """Share of the step that each stage spends on `part`, such as `bubble`."""
        return [getattr(stage, part) / self.seconds for stage in self.stages]


def run(schedule: Schedule, costs: PassCosts, link: Link | None = None) -> PipelineRun:
    """Play a step. The schedule must be one that `schedules.check` accepts."""
    stages = [_Stage(number, schedule, costs, link or Link()) for number in range(schedule.stages)]
    arrived: dict[Work, _Message] = {}
    while sum(stage.advance(arrived) for stage in stages):
        pass
    assert all(stage.finished for stage in stages), f"{schedule.name} deadlocks"
    seconds = max(stage.free for stage in stages)
    return PipelineRun(schedule, seconds, tuple(stage.use(seconds) for stage in stages))


@dataclass(frozen=True, slots=True)
class _Message:
    """A result: when it was there, and when it is where it is needed."""

    made: float
    arrives: float


class _Stage:
    """Where a stage stands."""

    def __init__(self, number: int, schedule: Schedule, costs: PassCosts, link: Link) -> None:
        self._number, self._passes = number, schedule.passes[number]
        self._schedule, self._costs, self._link = schedule, costs, link
        self._sending = 0.0
        self._spans: list[Span] = []
        self._done: list[PassCost] = []
        self._transfer = 0.0
        self.free = 0.0

    @property
    def finished(self) -> bool:
        return len(self._spans) == len(self._passes)

    def advance(self, arrived: dict[Work, _Message]) -> int:
        """Do all passes that can be done by now. Returns how many there were."""
        first = len(self._spans)
        while not self.finished:
            works = self._passes[len(self._spans)]
            before = [b for work in works for b in self._schedule.before(work)]
            if not all(b in arrived for b in before):
                break
            self._do(works, [self._received(b, arrived[b]) for b in before], arrived)
        return len(self._spans) - first

    def _received(self, work: Work, message: _Message) -> _Message:
        """A result of this stage's own is here when it is made, wherever else it goes."""
        local = self._schedule.stage_of[work.chunk] == self._number
        return _Message(message.made, message.made) if local else message

    def _do(self, works: Pass, needed: list[_Message], arrived: dict[Work, _Message]) -> None:
        cost = self._costs.of(works)
        start = self.free
        for message in sorted(needed, key=lambda message: message.arrives):
            if message.arrives > start:
                self._transfer += message.arrives - max(start, message.made)
                start = message.arrives
        self._spans.append(Span(works, start, start + cost.seconds))
        self._done.append(cost)
        self.free = start + cost.seconds
        for work in sorted(works, key=lambda work: cost.ready[work.strand]):
            made = start + cost.ready[work.strand]
            arrived[done_as(work)] = _Message(made, self._sent(work, made))

    def _sent(self, work: Work, made: float) -> float:
        """When the result of a work is where it is needed."""
        if self._schedule.sent_to(work) is None:
            return made
        start = max(made, self._sending)
        self._sending = start + self._costs.bytes_sent(work) / self._link.bandwidth
        return self._sending + self._link.latency

    def use(self, seconds: float) -> StageUse:
        compute = sum(cost.compute for cost in self._done)
        passes = sum(cost.seconds for cost in self._done)
        return StageUse(
            compute,
            passes - compute,
            self._transfer,
            seconds - passes - self._transfer,
            self._peak(),
            tuple(self._spans),
        )

    def _peak(self) -> float:
        saved = peak = 0.0
        for cost in self._done:
            peak = max(peak, saved + cost.rise)
            saved += cost.change
        return peak
