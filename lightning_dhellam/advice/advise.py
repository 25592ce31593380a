"""How a model is best spread over a cluster: every choice bounded, the best ones played.

A step cannot be shorter than the computation of its busiest stage, nor take less memory than the
weights, gradients, optimizer and one micro-batch's activations of any stage. Choices are played in
the order of the first bound until it exceeds the step of the last one that would be shown; those
that the second bound rules out are not played. So nothing that belongs among the best is lost.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from lightning_dhellam.advice.choices import Question, runs, shape_of
from lightning_dhellam.advice.lowering import Lowering, lowering_of
from lightning_dhellam.advice.memory import memory_of
from lightning_dhellam.advice.predict import builders_of, choice_of, prediction_of
from lightning_dhellam.advice.priceable import Conditions, Priceable
from lightning_dhellam.memory import RankMemory, Run
from lightning_dhellam.plan import Graph, Lane
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.search.cluster import Advice, Candidate, Known, Prediction
from lightning_dhellam.search.cluster.ending import optimizer

SHOWN = 10
"""Candidates that are kept."""
_STATE = 12
"""Bytes of an optimizer's state for each parameter: two moments and a master weight in fp32."""
_PARTS = {
    "compute": "compute",
    "exposed": "communication that nothing hides",
    "transfer": "transfers between stages",
    "bubble": "bubble",
    "reduction": "reduction of gradients",
    "optimizer": "optimizer",
}
_TOO_LARGE = "need more memory than a device has"
_TOO_SLOW = "compute for longer than the last of these takes"


@dataclass
class _Bounded:
    """A choice that may be among the best.

    Attributes:
        priceable: with its operators' prices.
        least: seconds that its step takes at least.
    """

    priceable: Priceable
    least: float


class Adviser:
    """Finds the best choices of one question.

    Args:
        question: what is asked.
        conditions: cluster and profile.
        shown: candidates to keep.
        progress: is told how many choices were played, of how many.
    """

    def __init__(
        self,
        question: Question,
        conditions: Conditions,
        shown: int = SHOWN,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._question = question
        self._conditions = conditions
        self._known: Known | None = conditions.known()
        self._shown = shown
        self._progress = progress
        self._lowerings: dict[Run, Lowering] = {}
        self._memories: dict[Run, tuple[RankMemory, ...]] = {}
        self._refused: Counter[str] = Counter()

    def advise(self, *, prune: bool = True) -> Advice:
        """Search. Without `prune` every choice is played.

        Raises:
            ValueError: the batch cannot be shared out, or nothing fits into memory; with the
                nearest that would.
        """
        begin = time.perf_counter()
        every = [*runs(self._question, self._refused)]
        looked_at = len(every) + sum(self._refused.values())
        bounded = self._bounded(every, prune)
        best: list[tuple[float, Run, Prediction]] = []
        played = 0
        builders = builders_of("auto")
        for number, one in enumerate(bounded):
            if self._progress is not None:
                self._progress(number, len(bounded))
            if prune and len(best) == self._shown and one.least >= best[-1][0]:
                self._refused[_TOO_SLOW] += len(bounded) - number
                break
            run = one.priceable.run
            seconds = one.priceable.play(builders, sketch=True).seconds
            played += 1
            if len(best) == self._shown and seconds >= best[-1][0]:
                continue
            memory = self._memory(run)
            if max(rank.total for rank in memory) > self._conditions.device.memory:
                self._refused[_TOO_LARGE] += 1
                continue
            found = prediction_of(one.priceable, builders, memory=memory, sketch=True)
            best = sorted([*best, (seconds, run, found)], key=lambda row: row[0])[: self._shown]
        if not best:
            raise ValueError(self._nothing_fits(every))
        first = best[0][2]
        return Advice(
            tuple(Candidate(found, reason(found, first)) for _, _, found in best),
            looked_at,
            played,
            dict(self._refused),
            time.perf_counter() - begin,
        )

    def run_of(self, prediction: Prediction) -> Run:
        """The run that a candidate is of."""
        every = runs(self._question, Counter())
        return next(run for run in every if choice_of(run) == prediction.choice)

    def whole(self, prediction: Prediction) -> Prediction:
        """The prediction of a candidate with all of its layers played."""
        run = self.run_of(prediction)
        one = Priceable.of(run, self._conditions, self._known, self._lowering(run))
        return prediction_of(one, builders_of(run.plan), memory=self._memory(run))

    def _bounded(self, every: list[Run], prune: bool) -> list[_Bounded]:
        """Choices that may fit, those with the shortest bound first."""
        found = []
        for run in every:
            one = Priceable.of(run, self._conditions, self._known, self._lowering(run))
            if prune and least_bytes(one) > self._conditions.device.memory:
                self._refused[_TOO_LARGE] += 1
                continue
            found.append(_Bounded(one, least_seconds(one)))
        return sorted(found, key=lambda one: one.least)

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
        conditions = self._conditions

        def needs(run: Run) -> float:
            lowering = self._lowering(run)
            return least_bytes(Priceable.of(run, conditions, self._known, lowering))

        run = min(every, key=needs)
        bytes_ = max(rank.total for rank in self._memory(run))
        has = conditions.device.memory
        return (
            f"nothing fits: the least that a rank takes is {bytes_ / 2**30:.1f} GiB"
            f" ({choice_of(run)}), and {conditions.device.name} has {has / 2**30:.1f} GiB: use more"
            " devices, shorter sequences, or a smaller model"
        )


def least_seconds(one: Priceable) -> float:
    """Seconds that a step takes at least: of its busiest stage, and of the optimizer.

    A stage computes for all micro-batches, and not before the first of them has been forward
    through the chunks before its own.
    """
    work = one.work
    pairs = {id(pair): pair for pair in work.layers}
    ahead = {number: _computed(one, pair.forward) for number, pair in pairs.items()}
    both = {n: ahead[n] + _computed(one, pair.backward) for n, pair in pairs.items()}
    machine, most = one.machine, 0.0
    for stage in range(work.stages):
        own = [*work.of_stage(stage)]
        first = min(own)
        waited = sum(ahead[id(layer)] for layer in work.layers[:first])
        computed = work.micro_batches * sum(both[id(work.layers[n])] for n in own)
        most = max(most, waited + computed)
    last = max(
        optimizer(work, [*work.of_stage(stage)], machine, one.groups)[0]
        for stage in range(work.stages)
    )
    return most + last


def _computed(one: Priceable, graph: Graph) -> float:
    """Seconds of the operators of a graph that compute."""
    costs = one.priced.costs
    return sum(costs.alone(graph, o.name) for o in graph.operators if o.lane is Lane.COMPUTE)


def least_bytes(one: Priceable) -> float:
    """Bytes that a rank takes at least: states, and the activations of one micro-batch."""
    work, numbers = one.work, PRECISIONS[one.run.precision]
    most = 0.0
    for stage in range(work.stages):
        held = saved = 0.0
        for n in work.of_stage(stage):
            weights = work.weights[n]
            for count, reach in (
                (weights.dense, one.groups.dense),
                (weights.experts, one.groups.experts),
            ):
                state = _STATE if numbers.master_weights else 8
                shards = reach.size if work.sharded else 1
                each = numbers.dtype.itemsize + work.gradient_bytes + state / shards
                held += count * each
            saved += work.layers[n].saved_bytes(work.tokens)
        most = max(most, held + saved)
    return most


def reason(found: Prediction, best: Prediction) -> str:
    """Why a candidate is not the best one: what it does for longer; empty for the best itself."""
    if found is best:
        return ""
    more = {word: _mean(found, part) - _mean(best, part) for part, word in _PARTS.items()}
    word = max(more, key=lambda name: more[name])
    share = found.seconds / best.seconds - 1
    if share < 1e-4:
        return "as fast"
    return f"{share:.1%} slower: {more[word] / best.seconds:.1%} of the best step more in {word}"


def _mean(found: Prediction, part: str) -> float:
    return sum(getattr(stage, part) for stage in found.stages) / len(found.stages)
