"""How a model is best spread over a cluster: every choice bounded, the best ones played.

A step cannot be shorter than its schedule with visits as short as any order lets them be, nor take
less memory than weights, gradients, optimizer and the activations that its schedule holds. Choices
are played in the order of the first bound, and taken in the order of their steps: one as soon as
its step is no longer than the bound of all that are not played yet, if it fits into memory, until
there are as many as are shown. Those that the second bound rules out are not played. So nothing
that belongs among the best is lost. These few get plans of their own then, for as long as there is
time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from lightning_dhellam.advice.bounds import least_bytes, least_time
from lightning_dhellam.advice.choices import Question, runs, searching, shape_of, stands_in
from lightning_dhellam.advice.lowering import Lowering, lowering_of
from lightning_dhellam.advice.memory import memory_of
from lightning_dhellam.advice.plans import PlanSearch
from lightning_dhellam.advice.predict import choice_of, prediction_of
from lightning_dhellam.advice.priceable import Conditions, Priceable
from lightning_dhellam.advice.schedules import settled
from lightning_dhellam.memory import RankMemory, Run
from lightning_dhellam.plan import BUILDERS, Builder, Lane
from lightning_dhellam.search.cluster import Advice, Candidate, Known, Prediction, Priced
from lightning_dhellam.search.cluster.step import Visits
from lightning_dhellam.search.pipeline import Effort

SHOWN = 10
"""Candidates that are kept."""
SECONDS = 60.0
"""For which plans of the candidates are searched."""
_SURE = 0.98
"""Of the bytes of weights, optimizer and saved activations: by as much are they less than all that
a rank takes, whatever the order of the operators."""
_EFFORT = Effort(starts=200, improved=1, moves=1000)
"""With which schedules of the best are searched."""
_TIE = 1e-4
"""Share of a step below which two are as fast."""
_PARTS = {
    "compute": "compute",
    "exposed": "communication that nothing hides",
    "transfer": "transfers between stages",
    "bubble": "bubble",
    "reduction": "reduction of gradients",
    "optimizer": "optimizer",
}
_TOO_LARGE = "need more memory than a device has"
_TOO_SLOW = "cannot take less than the last of these, whatever their plan"
_SLOWER = "take longer than the last of these"


@dataclass
class _Bounded:
    """A choice that may be among the best.

    Attributes:
        priceable: with its operators' prices.
        least: seconds that its step takes at least.
        builders: orders that it is played by.
        visits: that were played with the same layers, prices and orders.
        seconds: that its step takes, once it was played.
        saved: bytes of activations that each stage of a pipeline then holds at most.
    """

    priceable: Priceable
    least: float
    builders: Mapping[str, Builder]
    visits: Visits
    seconds: float = 0.0
    saved: tuple[float, ...] = ()

    @property
    def run(self) -> Run:
        return self.priceable.run

    def play(self) -> float:
        """Play a step, of few layers of many that are alike."""
        step = self.priceable.play(self.builders, sketch=True, known=self.visits)
        self.seconds = step.seconds
        return self.seconds


class Adviser:
    """Finds the best choices of one question.

    Args:
        question: what is asked.
        conditions: cluster and profile.
        shown: candidates to keep.
        progress: is told how many choices were played, of how many.
        plans: searches the plans of the candidates.
    """

    def __init__(
        self,
        question: Question,
        conditions: Conditions,
        shown: int = SHOWN,
        progress: Callable[[int, int], None] | None = None,
        plans: PlanSearch | None = None,
    ) -> None:
        self._question = question
        self._conditions = conditions
        self._known: Known | None = conditions.known()
        self._shown = shown
        self._progress = progress
        self._plans = plans or PlanSearch(SECONDS)
        self._lowerings: dict[Run, Lowering] = {}
        self._prices: dict[Hashable, Priced] = {}
        self._visits: dict[Hashable, Visits] = {}
        self._memories: dict[Run, tuple[RankMemory, ...]] = {}
        self._refused: Counter[str] = Counter()
        self._chosen: list[_Bounded] = []
        self._played = 0

    def advise(self, *, prune: bool = True) -> Advice:
        """Search. Without `prune` every choice is played.

        Raises:
            ValueError: the batch cannot be shared out, or nothing fits into memory; with the
                nearest that would.
        """
        begin = time.perf_counter()
        every = [*runs(self._question, self._refused)]
        looked_at = len(every) + sum(self._refused.values())
        best = self._ranked(self._bounded(every, prune), prune)
        if not best:
            raise ValueError(self._nothing_fits(every))
        for one in best:
            key = self._key(one.run)
            builders = self._plans.builders(one.priceable, key)
            if builders is not None:
                one.builders, one.visits = builders, self._visits.setdefault(("auto", key), {})
                one.play()
        scheduled = self._scheduled(best)
        asked = [one for one in best if not stands_in(self._question, one.run)]
        looked_at += len(scheduled) - (len(best) - len(asked))
        best = asked + scheduled
        if not best:
            raise ValueError(self._nothing_fits(every))
        self._chosen = sorted(best, key=lambda one: one.seconds)[: self._shown]
        self._refused[_SLOWER] += len(best) - len(self._chosen)
        found = [self._prediction(one, sketch=True) for one in self._chosen]
        return Advice(
            tuple(Candidate(one, reason(one, found[0])) for one in found),
            looked_at,
            self._played,
            dict(self._refused),
            time.perf_counter() - begin,
        )

    def run_of(self, prediction: Prediction) -> Run:
        """The run that a candidate is of."""
        return self._of(prediction).run

    def whole(self, prediction: Prediction) -> Prediction:
        """The prediction of a candidate with all of its layers played."""
        return self._prediction(self._of(prediction), sketch=False)

    def _of(self, prediction: Prediction) -> _Bounded:
        return next(one for one in self._chosen if choice_of(one.run) == prediction.choice)

    def _prediction(self, one: _Bounded, *, sketch: bool) -> Prediction:
        memory = self._memory(one.run)
        return prediction_of(one.priceable, one.builders, memory=memory, sketch=sketch)

    def _bounded(self, every: list[Run], prune: bool) -> list[_Bounded]:
        """Choices that may fit, those with the shortest bound first."""
        found = []
        for run in every:
            one = self._priceable(run)
            if prune and least_bytes(one) > self._conditions.device.memory:
                self._refused[_TOO_LARGE] += 1
                continue
            visits = self._visits.setdefault(self._key(run), {})
            least = least_time(one, visits)
            if prune and self._is_larger(one, least.saved):
                self._refused[_TOO_LARGE] += 1
                continue
            found.append(_Bounded(one, least.seconds, BUILDERS, visits, saved=least.saved))
        return sorted(found, key=lambda one: one.least)

    def _ranked(self, bounded: list[_Bounded], prune: bool) -> list[_Bounded]:
        """The choices with the shortest steps of those that fit, the shortest first."""
        waiting: list[tuple[float, int]] = []
        best: list[_Bounded] = []
        number = 0
        while len(best) < self._shown and (waiting or number < len(bounded)):
            more = number < len(bounded)
            if more and (not prune or not waiting or bounded[number].least < waiting[0][0]):
                if self._progress is not None:
                    self._progress(number, len(bounded))
                heappush(waiting, (bounded[number].play(), number))
                number += 1
                continue
            one = bounded[heappop(waiting)[1]]
            if self._fits(one, prune):
                best.append(one)
            else:
                self._refused[_TOO_LARGE] += 1
        self._played = number
        self._refused[_SLOWER] += len(waiting)
        self._refused[_TOO_SLOW] += len(bounded) - number
        self._refused = +self._refused
        return best

    def _scheduled(self, best: list[_Bounded]) -> list[_Bounded]:
        """Search schedules for the best, and give those whose steps it makes shorter.

        Where another schedule was played in its place, a searched one is given whatever it takes.
        """
        least: dict[Run, _Bounded] = {}
        for one in best:
            run = searching(self._question, one.run)
            if run is not None and (run not in least or one.seconds < least[run].seconds):
                least[run] = one
        found = []
        for run, other in least.items():
            needed = stands_in(self._question, other.run)
            if self._plans.is_over and not needed:
                continue
            begun, known = self._priceable(run), self._memory(run)
            priceable, self._memories[run] = settled(begun, other.builders, known, _EFFORT)
            new = _Bounded(priceable, other.least, other.builders, other.visits)
            if not self._fits(new, False):
                continue
            if new.play() < other.seconds * (1 - _TIE) or needed:
                found.append(new)
        return found

    def _fits(self, one: _Bounded, prune: bool) -> bool:
        if prune and self._is_larger(one.priceable, one.saved):
            return False
        limit = self._conditions.device.memory
        return max(rank.total for rank in self._memory(one.run)) <= limit

    def _is_larger(self, one: Priceable, saved: Sequence[float]) -> bool:
        """Whether a rank takes more than there is, if stages save so much."""
        return _SURE * least_bytes(one, saved) > self._conditions.device.memory

    def _priceable(self, run: Run) -> Priceable:
        key = self._key(run)
        lowering = self._lowering(run)
        one = Priceable.of(run, self._conditions, self._known, lowering, self._prices.get(key))
        self._prices[key] = one.priced
        return one

    def _key(self, run: Run) -> Hashable:
        """The same for runs whose layers have the same operators with the same prices."""
        machine = self._conditions.machine
        reaches = (machine.reach(lane, run.topology) for lane in (Lane.TP, Lane.CP, Lane.EP))
        return shape_of(run), run.micro_batch_size, *reaches

    def _lowering(self, run: Run) -> Lowering:
        shape = shape_of(run)
        if shape not in self._lowerings:
            self._lowerings[shape] = lowering_of(shape)
        return self._lowerings[shape]

    def _memory(self, run: Run) -> tuple[RankMemory, ...]:
        if run not in self._memories:
            self._memories[run] = memory_of(run)
        return self._memories[run]

    def _nothing_fits(self, every: list[Run]) -> str:
        run = min(every, key=lambda run: least_bytes(self._priceable(run)))
        bytes_ = max(rank.total for rank in self._memory(run))
        has = self._conditions.device.memory
        return (
            f"nothing fits: the least that a rank takes is {bytes_ / 2**30:.1f} GiB"
            f" ({choice_of(run)}), and {self._conditions.device.name} has {has / 2**30:.1f} GiB:"
            " use more devices, shorter sequences, or a smaller model"
        )


def reason(found: Prediction, best: Prediction) -> str:
    """Why a candidate is not the best one: what it does for longer; empty for the best itself."""
    if found is best:
        return ""
    more = {word: _mean(found, part) - _mean(best, part) for part, word in _PARTS.items()}
    word = max(more, key=lambda name: more[name])
    share = found.seconds / best.seconds - 1
    if share < _TIE:
        return "as fast"
    return f"{share:.1%} slower: {more[word] / best.seconds:.1%} of the best step more in {word}"


def _mean(found: Prediction, part: str) -> float:
    return sum(getattr(stage, part) for stage in found.stages) / len(found.stages)
