"""Runs the steps of one rank, two strands at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.executor import Entry, Executor, Observer, OnGradient, Wrap
from lightning_dhellam.engine.programs import Programs
from lightning_dhellam.engine.rehearsal import Rehearsals, untouched
from lightning_dhellam.engine.trace import Tracer
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.engine.walk import Walker
from lightning_dhellam.pipeline.schedules import Scheme
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import BUILDERS, Builder, Ends, Graph, GraphPair, Plan

_QUEUED = 100
"""Operators that a device takes into its queue without holding up the host."""


class Engine:
    """Runs training and evaluation steps of one rank.

    Args:
        layers: graphs of every layer of this rank, first to last. The last one's output is the
            loss, unless it is sent to another stage.
        lanes: of this rank's device.
        builder: makes the plan of each pair of graphs.
        logits: graph that takes the last layer's place for prediction.
        stage: this rank's place in the pipeline; None when it has all layers.
        module: whose buffers are as before after what is run for its own sake: a profile, or a
            rehearsal.
        ends: what a step has beside its layers.
    """

    def __init__(
        self,
        layers: Sequence[GraphPair],
        lanes: Lanes,
        builder: Builder,
        logits: Graph | None = None,
        stage: Stage | None = None,
        module: torch.nn.Module | None = None,
        ends: Ends | None = None,
    ) -> None:
        self.lanes = lanes
        self.logits = logits
        self._stage = stage
        self._executor = Executor(lanes)
        self._programs = Programs(layers, builder)
        self._walker = Walker(lanes, self._executor, self._programs)
        self._module = module
        self._ends = ends or Ends()
        self._rehearsals = Rehearsals(self._executor, self.layers, self.stage, module)

    @property
    def layers(self) -> tuple[GraphPair, ...]:
        """The graphs of every layer of this rank, first to last."""
        return self._programs.layers

    @property
    def stage(self) -> Stage:
        """This rank's place in the pipeline."""
        return self._stage or Stage.alone(len(self.layers))

    @property
    def builder(self) -> Builder:
        """What makes the plan of each pair of graphs."""
        return self._programs.builder

    def follow(self, scheme: Scheme) -> None:
        """Walk by the schedules of `scheme` from the next step on. Layers stay where they are."""
        self._stage = replace(self.stage, scheme=scheme)
        self._rehearsals.follow(self._stage)

    def install(self, builder: Builder) -> None:
        """Use the plans of `builder` from the next visit on."""
        self._programs.install(builder)

    def suit(self, length: int) -> None:
        """Make plans from the nominal costs of sequences of `length` tokens, from the next pass on.

        They are made for the longest that the model accepts before. All plans can run sequences of
        any length.
        """
        self._programs.suit(length)
        if self.logits is not None:
            self.logits = self.logits.at(length)

    def plans(self) -> list[Plan]:
        """The plans of a training step, one for each distinct pair of graphs, in walking order."""
        for leg in self.stage.kinds():
            for forward, backward in leg.pairs:
                for pair in ((forward, backward), (forward, None), (None, backward)):
                    self._programs.of_pair(*pair, leg.part)
        return self._programs.plans()

    def train(
        self, micro_batches: Sequence[MicroBatch], on_gradient: OnGradient | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch. Gradients are added to `main_grad`.

        `on_gradient` is called for the last micro-batch only, whose additions are the last ones.
        Returns the loss of the batch, a scalar in fp32; 0 on a stage that does not have it.
        """
        self.rehearse(micro_batches)
        with torch.no_grad():
            self._walker.beside(self._ends.prologue)
            losses = self._walker.train(
                micro_batches, self.stage.step(len(micro_batches)), on_gradient
            )
            self._walker.beside(self._ends.epilogue, on_gradient)
            if self._ends.epilogue:
                self.lanes.drain()  # what was received goes when every lane has read it
            return _total(losses, micro_batches)

    def rehearse(self, micro_batches: Sequence[MicroBatch], *, wanted: bool = False) -> None:
        """Do alone what this stage's next training step needs of it, unless it is known.

        With `wanted` also where there is no other stage, so that no kernel is compiled in a step.
        """
        self._rehearsals.before(
            ("train", self.builder), micro_batches, self._train_alone, wanted=wanted
        )

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The loss of the batch, forward only: a scalar in fp32; 0 where it is not known."""
        graphs = [pair.forward for pair in self.layers]
        return _total(self._forward(graphs, micro_batches), micro_batches)

    def predict(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Logits [B, S, V] of the batch, forward only; nothing on a stage that has no head."""
        graphs = [pair.forward for pair in self.layers]
        if self.stage.number == self.stage.placement.last:
            assert self.logits is not None, "the engine was made without a graph for logits"
            graphs[-1] = self.logits
        logits = self._forward(graphs, micro_batches)
        return torch.cat(logits) if logits else torch.empty(0)

    @contextmanager
    def traced(self, device: torch.device) -> Iterator[Tracer]:
        """Note when each operator of the steps inside starts and ends."""
        tracer = Tracer(self.layers, device)
        with self.wrapped(tracer.traced):
            yield tracer

    @contextmanager
    def wrapped(self, wrap: Wrap) -> Iterator[None]:
        """Run what `wrap` makes of each operator of the steps inside, in its place."""
        before = self._executor.wraps
        self._executor.wraps = (*before, wrap)
        try:
            yield
        finally:
            self._executor.wraps = before

    def untouched(self, device: torch.device) -> AbstractContextManager[None]:
        """Leaves nothing of what is run inside, but for gradients and what a user's code does."""
        return untouched(self._module, device)

    def capture(
        self, micro_batch: MicroBatch, number: int | None = None
    ) -> dict[tuple[str, str], list[Any]]:
        """What each kind of operator reads, by graph fingerprint and operator name.

        Runs the micro-batch forward and backward with nothing overlapped. Its gradients are
        added to `main_grad` as ever, so call it between a step and the next one's clearing.

        Args:
            micro_batch: to run. In a pipeline every stage must.
            number: of the layers of one kind, the one that is looked at, counted round; only what
                varies is then found. The first of each kind that runs if not given.
        """
        found: dict[tuple[str, str], list[Any]] = {}
        alike: dict[str, list[Graph]] = {}
        for pair in self.layers:
            for graph in (pair.forward, pair.backward):
                alike.setdefault(graph.fingerprint, []).append(graph)
        kinds = {
            id(operator): graph
            for same in alike.values()
            for graph in (same if number is None else [same[number % len(same)]])
            for operator in graph.operators
            if number is None or operator.varies
        }

        def observe(entry: Entry, values: list[Any]) -> None:
            graph = kinds.get(id(entry.operator))
            if graph is None:
                return  # a transfer between stages
            key = (graph.fingerprint, entry.operator.name)
            if key not in found:
                found[key] = _copies(values)

        def copy(entry: Entry, values: list[Any]) -> None:
            _copies(values)  # by kernels, which are rehearsed as well

        with self._sequential():
            self._rehearsals.once([micro_batch], self._train_alone, copy)
            self._watch(micro_batch, observe)
        return found

    def issue_seconds(self, micro_batch: MicroBatch) -> float:
        """Seconds between the launches of two operators, where the host waits for nothing.

        Adds to gradients as `capture` does.
        """
        moments: list[float] = []
        with self._sequential():
            self._watch(micro_batch, lambda entry, values: moments.append(time.perf_counter()))
        # Later ones may wait for room in the device's queue.
        return median(b - a for a, b in pairwise(moments[:_QUEUED]))

    @contextmanager
    def _sequential(self) -> Iterator[None]:
        """Have steps inside overlap nothing."""
        builder = self.builder
        self.install(BUILDERS["sequential"])
        try:
            yield
        finally:
            self.install(builder)

    def _watch(self, micro_batch: MicroBatch, observer: Observer) -> None:
        """Show `observer` every operator of one micro-batch."""
        self._executor.observer = observer
        try:
            self.train([micro_batch])
        finally:
            self._executor.observer = None

    def _train_alone(self, pieces: list[MicroBatch]) -> None:
        _total(self._walker.train(pieces, self.stage.step(len(pieces))), pieces)

    def _forward(
        self, graphs: Sequence[Graph], micro_batches: Sequence[MicroBatch]
    ) -> list[Tensor]:
        """What the last graph hands over for each micro-batch, if it is the model's last."""
        # Without a key nothing random happens: no dropout.
        no_keys = dict.fromkeys(("batch.key", "batch.whole_key"))
        still = [replace(p, slots={**p.slots, **no_keys}) for p in micro_batches]

        def alone(pieces: list[MicroBatch]) -> None:
            self._walker.ahead(pieces, self.stage.step(len(pieces), backward=False), graphs)

        # Prediction ends in another graph than evaluation.
        self._rehearsals.before((graphs[-1].fingerprint, self.builder), still, alone)
        with torch.no_grad():
            self._walker.beside(self._ends.prologue)
            return self._walker.ahead(still, self.stage.step(len(still), backward=False), graphs)


def _copies(values: Sequence[Any]) -> list[Any]:
    """The same values, whatever an operator overwrites afterwards."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def _total(losses: Sequence[Tensor], micro_batches: Sequence[MicroBatch]) -> Tensor:
    """The sum of the losses; 0 on a stage that has none."""
    if losses:
        return torch.stack(list(losses)).sum()
    tokens: Tensor = micro_batches[0].slots["batch.tokens"]
    return tokens.new_zeros((), dtype=torch.float32)
