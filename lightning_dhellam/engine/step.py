"""Walks micro-batches through the layers of a stage, two strands at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.executor import (
    Entry,
    Executor,
    Job,
    Observer,
    OnGradient,
    Program,
    Wrap,
    bind,
    receives,
)
from lightning_dhellam.engine.lanes import Lanes
from lightning_dhellam.engine.rehearsal import Rehearsals, untouched
from lightning_dhellam.engine.state import StepState
from lightning_dhellam.engine.tape import Slot
from lightning_dhellam.engine.trace import Tracer
from lightning_dhellam.pipeline.schedules import Part, Scheme
from lightning_dhellam.pipeline.stage import Leg, Stage, Step
from lightning_dhellam.plan import (
    BEGIN,
    BUILDERS,
    Builder,
    Ends,
    Graph,
    GraphPair,
    Operator,
    Plan,
    Strand,
    passes,
)

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
        self.layers = tuple(layers)
        self.lanes = lanes
        self.logits = logits
        self._stage = stage
        self._executor = Executor(lanes)
        self._builder = builder
        self._plans: dict[tuple[str, str], Plan] = {}
        self._programs: dict[tuple[int | None, int | None, Part], Program] = {}
        self._evaluations: dict[int, Program] = {}
        self._halves: dict[int, tuple[Graph, Graph]] = {}
        self._module = module
        self._ends = ends or Ends()
        self._rehearsals = Rehearsals(self._executor, self.layers, self.stage, module)

    @property
    def stage(self) -> Stage:
        """This rank's place in the pipeline."""
        return self._stage or Stage.alone(len(self.layers))

    @property
    def builder(self) -> Builder:
        """What makes the plan of each pair of graphs."""
        return self._builder

    def follow(self, scheme: Scheme) -> None:
        """Walk by the schedules of `scheme` from the next step on. Layers stay where they are."""
        self._stage = replace(self.stage, scheme=scheme)
        self._rehearsals.follow(self._stage)

    def install(self, builder: Builder) -> None:
        """Use the plans of `builder` from the next visit on."""
        self._builder = builder
        self._plans.clear()
        self._programs.clear()
        self._evaluations.clear()

    def suit(self, length: int) -> None:
        """Make plans from the nominal costs of sequences of `length` tokens, from the next pass on.

        They are made for the longest that the model accepts before. All plans can run sequences of
        any length.
        """
        self.layers = tuple(pair.at(length) for pair in self.layers)
        self._halves.clear()
        if self.logits is not None:
            self.logits = self.logits.at(length)
        self.install(self._builder)

    def plans(self) -> list[Plan]:
        """The plans of a training step, one for each distinct pair of graphs, in walking order."""
        for leg in self.stage.kinds():
            for forward, backward in leg.pairs:
                for pair in ((forward, backward), (forward, None), (None, backward)):
                    self._program(*pair, leg.part)
        return list(dict.fromkeys(self._plans.values()))

    def train(
        self, micro_batches: Sequence[MicroBatch], on_gradient: OnGradient | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch. Gradients are added to `main_grad`.

        `on_gradient` is called for the last micro-batch only, whose additions are the last ones.
        Returns the loss of the batch, a scalar in fp32; 0 on a stage that does not have it.
        """
        self.rehearse(micro_batches)
        with torch.no_grad():
            self._beside(self._ends.prologue)
            losses = self._train(micro_batches, self.stage.step(len(micro_batches)), on_gradient)
            self._beside(self._ends.epilogue, on_gradient)
            return _total(losses, micro_batches)

    def rehearse(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Do alone what this stage's next training step needs of it, unless it is known."""
        self._rehearsals.before(("train", self._builder), micro_batches, self._train_alone)

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
        builder = self._builder
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

    def _beside(self, operators: Sequence[Operator], on_gradient: OnGradient | None = None) -> None:
        """Run a prologue or an epilogue."""
        if not operators:
            return
        slots = self.lanes.constants({BEGIN: None})
        for operator in operators:
            inputs = [slots[name] for name in operator.reads]
            launched = self._executor.wrapped(operator)
            value, mark = self.lanes.launch(launched, inputs, crosses=True)
            slots |= {name: Slot(value, mark) for name in operator.writes}
            if operator.accumulates and on_gradient is not None:
                on_gradient(operator.accumulates)
        if operators is self._ends.epilogue:
            self.lanes.drain()  # what was received goes when every lane has read it

    def _legs(self, state: StepState, step: Step, forwards: Sequence[Graph]) -> Iterator[Leg]:
        """The walks of a step. The receives of the next are hidden under this one."""
        for layer, graph in enumerate(forwards):
            for operator in graph.prologue:
                state.prepare(layer, self._executor.prepare(operator))
        self._post(state, step.legs[0], forwards)
        last = step.last
        for index, leg in enumerate(step.legs):
            self.lanes.settle(step.ahead)
            for following in step.legs[index + 1 : index + 2]:
                self._post(state, following, forwards)
            yield leg
            for micro_batch in {leg.forward, leg.backward}:
                if micro_batch is not None and last[micro_batch] == index:
                    state.end(micro_batch)
        state.finish()
        # The caller's tensors, the micro-batches, must outlive every lane's use of them.
        self.lanes.drain()

    def _train(
        self,
        micro_batches: Sequence[MicroBatch],
        step: Step,
        on_gradient: OnGradient | None = None,
    ) -> list[Tensor]:
        """Walk forward and backward. Returns the losses that this stage has."""
        state = StepState(micro_batches, self.lanes, self._readers)
        losses: list[Tensor] = []
        final = len(micro_batches) - 1
        for leg in self._legs(state, step, [pair.forward for pair in self.layers]):
            self._pass(leg, state, on_gradient if leg.backward == final else None)
            losses += self._results(state, leg)
        return losses

    def _results(self, state: StepState, leg: Leg) -> list[Tensor]:
        """What the model's last layer has handed over in a walk: the loss, or logits."""
        ends = any(forward == len(self.layers) - 1 for forward, _ in leg.pairs)
        return state.results(leg.forward) if ends and leg.forward is not None else []

    def _train_alone(self, pieces: list[MicroBatch]) -> None:
        _total(self._train(pieces, self.stage.step(len(pieces))), pieces)

    def _post(self, state: StepState, leg: Leg, forwards: Sequence[Graph]) -> None:
        """Issue what the first graph of each strand receives from another stage."""
        for strand, layer in leg.begins:
            micro_batch = leg.forward if strand is Strand.FORWARD else leg.backward
            assert micro_batch is not None
            ahead = strand is Strand.FORWARD
            graph = forwards[layer] if ahead else self._backward(layer, leg.part)
            if graph.receives:
                self._executor.post(receives(graph), state.tape(micro_batch, layer))

    def _pass(self, leg: Leg, state: StepState, on_gradient: OnGradient | None) -> None:
        """Forward up to the last layer of the leg, backward down to its first."""
        previous: Job | None = None
        for forward, backward in leg.pairs:
            job = self._enter_pair(state, leg, forward, backward)
            if job is None:
                self._leave_pair(state, leg, forward, backward)
                continue  # such as the first half of an embedding's backward
            if previous is not None and previous.program.plan is not job.program.plan:
                self._executor.finish(previous, on_gradient)
                previous = None
            self._executor.run(job, previous, on_gradient)
            self._leave_pair(state, leg, forward, backward)
            previous = job if job.program.leaves else None
        if previous is not None:
            self._executor.finish(previous, on_gradient)

    def _enter_pair(
        self, state: StepState, leg: Leg, forward: int | None, backward: int | None
    ) -> Job | None:
        """Open the tapes of a pair of layers. Returns None where there is nothing to do."""
        tapes = {}
        if forward is not None:
            assert leg.forward is not None
            graph = self.layers[forward].forward
            tapes[Strand.FORWARD] = state.enter(leg.forward, forward, graph)
        if backward is not None:
            assert leg.backward is not None
            graph = self._backward(backward, leg.part)
            tapes[Strand.BACKWARD] = state.enter(leg.backward, backward, graph)
        program = self._program(forward, backward, leg.part)
        return Job(program, tapes) if program is not None else None

    def _leave_pair(
        self, state: StepState, leg: Leg, forward: int | None, backward: int | None
    ) -> None:
        if forward is not None:
            assert leg.forward is not None
            state.leave(leg.forward, forward, self.layers[forward].forward)
        if backward is not None:
            assert leg.backward is not None
            state.leave(leg.backward, backward, self._backward(backward, leg.part))

    def _forward(
        self, graphs: Sequence[Graph], micro_batches: Sequence[MicroBatch]
    ) -> list[Tensor]:
        """What the last graph hands over for each micro-batch, if it is the model's last."""
        # Without a key nothing random happens: no dropout.
        no_keys = dict.fromkeys(("batch.key", "batch.whole_key"))
        still = [replace(p, slots={**p.slots, **no_keys}) for p in micro_batches]

        def alone(pieces: list[MicroBatch]) -> None:
            self._ahead(pieces, self.stage.step(len(pieces), backward=False), graphs)

        # Prediction ends in another graph than evaluation.
        self._rehearsals.before((graphs[-1].fingerprint, self._builder), still, alone)
        with torch.no_grad():
            self._beside(self._ends.prologue)
            return self._ahead(still, self.stage.step(len(still), backward=False), graphs)

    def _ahead(
        self, micro_batches: Sequence[MicroBatch], step: Step, graphs: Sequence[Graph]
    ) -> list[Tensor]:
        """Walk forward only. Returns what the last graph hands over, where it is."""
        state = StepState(micro_batches, self.lanes, lambda layer: Counter(graphs[layer].readers))
        found: list[Tensor] = []
        for leg in self._legs(state, step, graphs):
            assert leg.forward is not None
            for layer, _ in leg.pairs:
                assert layer is not None
                tape = state.enter(leg.forward, layer, graphs[layer])
                program = self._evaluation(graphs[layer])
                self._executor.run(Job(program, {Strand.FORWARD: tape}))
                state.leave(leg.forward, layer, graphs[layer])
                state.close(leg.forward, layer)
            found += self._results(state, leg)
        return found

    def _readers(self, layer: int) -> Counter[str]:
        """How many readers each slot of a layer has, over both directions."""
        pair = self.layers[layer]
        return pair.forward.readers + pair.backward.readers

    def _backward(self, layer: int, part: Part) -> Graph:
        """The backward graph of a layer, or one of its halves."""
        graph = self.layers[layer].backward
        if part is Part.BACKWARD:
            return graph
        if layer not in self._halves:
            self._halves[layer] = passes.halves(graph)
        return self._halves[layer][part is Part.WEIGHT]

    def _program(self, forward: int | None, backward: int | None, part: Part) -> Program | None:
        """The program of layer `forward` beside `part` of layer `backward`, made on first use.

        None where there is nothing to do.
        """
        key = (forward, backward, part)
        if key not in self._programs:
            ahead = self.layers[forward] if forward is not None else None
            behind = self._backward(backward, part) if backward is not None else None
            if behind is not None and not behind.operators:
                behind = None
            if ahead is None and behind is None:
                return None
            rest = None
            if backward is not None and part is Part.INPUT:
                rest = self._backward(backward, Part.WEIGHT)
            graph, follows = (ahead.forward, ahead.backward) if ahead else (None, None)
            self._programs[key] = bind(self._plan(graph, behind), graph, behind, follows, rest)
        return self._programs[key]

    def _evaluation(self, graph: Graph) -> Program:
        """The program of one graph that no backward follows."""
        if id(graph) not in self._evaluations:
            self._evaluations[id(graph)] = bind(self._plan(graph, None), graph, None)
        return self._evaluations[id(graph)]

    def _plan(self, forward: Graph | None, backward: Graph | None) -> Plan:
        key = (forward.fingerprint if forward else "", backward.fingerprint if backward else "")
        if key not in self._plans:
            self._plans[key] = self._builder(forward, backward)
        return self._plans[key]


def _copies(values: Sequence[Any]) -> list[Any]:
    """The same values, whatever an operator overwrites afterwards."""
    return [value.clone() if isinstance(value, Tensor) else value for value in values]


def _total(losses: Sequence[Tensor], micro_batches: Sequence[MicroBatch]) -> Tensor:
    """The sum of the losses; 0 on a stage that has none."""
    if losses:
        return torch.stack(list(losses)).sum()
    tokens: Tensor = micro_batches[0].slots["batch.tokens"]
    return tokens.new_zeros((), dtype=torch.float32)
