"""Walks micro-batches through the layers, two strands at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
    bind,
)
from lightning_dhellam.engine.lanes import Lanes
from lightning_dhellam.engine.tape import Slot, Tape
from lightning_dhellam.engine.trace import Tracer
from lightning_dhellam.pipeline import Direction, Pass, fold
from lightning_dhellam.plan import BUILDERS, Builder, Graph, GraphPair, Plan, Strand

_QUEUED = 100
"""Operators that a device takes into its queue without holding up the host."""


@dataclass
class Walk:
    """One micro-batch's way through the layers, forward and then backward.

    Attributes:
        batch: the tape of the micro-batch itself.
        tapes: of each layer that it has entered.
        carried: slots that the last graph handed over.
    """

    batch: Tape
    tapes: dict[int, Tape] = field(default_factory=dict)
    carried: list[Slot] = field(default_factory=list)


class Engine:
    """Runs training and evaluation steps of one rank.

    Args:
        layers: graphs of every layer, first to last; the last one's output is the loss.
        lanes: of this rank's device.
        builder: makes the plan of each pair of graphs.
        logits: graph that takes the last layer's place for prediction.
    """

    def __init__(
        self,
        layers: Sequence[GraphPair],
        lanes: Lanes,
        builder: Builder,
        logits: Graph | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.lanes = lanes
        self.logits = logits
        self._executor = Executor(lanes)
        self._builder = builder
        self._plans: dict[tuple[str, str], Plan] = {}
        self._programs: dict[tuple[int | None, int | None], Program] = {}
        self._evaluations: dict[int, Program] = {}

    def install(self, builder: Builder) -> None:
        """Use the plans of `builder` from the next pass on."""
        self._builder = builder
        self._plans.clear()
        self._programs.clear()
        self._evaluations.clear()

    def plans(self) -> list[Plan]:
        """The plans of a training step, one for each distinct pair of graphs, in walking order."""
        last = len(self.layers) - 1
        for index in range(len(self.layers)):
            for forward, backward in ((index, last - index), (index, None), (None, last - index)):
                self._program(forward, backward)
        return list(dict.fromkeys(self._plans.values()))

    def train(
        self, micro_batches: Sequence[MicroBatch], on_gradient: OnGradient | None = None
    ) -> Tensor:
        """Forward and backward of every micro-batch. Gradients are added to `main_grad`.

        `on_gradient` is called for the last micro-batch only, whose additions are the last ones.
        Returns the loss of the batch, a scalar in fp32.
        """
        walks: dict[int, Walk] = {}
        losses: list[Tensor] = []
        final = len(micro_batches) - 1
        with torch.no_grad():
            for step in fold(1, len(micro_batches))[0]:
                if step.direction is Direction.ASCENDING:
                    continue  # with one stage it is the other half of the same walk
                if step.forward is not None:
                    walks[step.forward] = self._enter(micro_batches[step.forward])
                notify = on_gradient if step.backward == final else None
                self._pass(step, walks, notify)
                if step.forward is not None:
                    losses.append(self._leave(walks[step.forward]))
                if step.backward is not None:
                    del walks[step.backward]
            self.lanes.barrier()
            return torch.stack(losses).sum()

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """The loss of the batch, forward only: a scalar in fp32."""
        graphs = [pair.forward for pair in self.layers]
        return torch.stack([self._forward(graphs, piece) for piece in micro_batches]).sum()

    def predict(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Logits [B, S, V] of the batch, forward only."""
        assert self.logits is not None, "the engine was made without a graph for logits"
        graphs = [*(pair.forward for pair in self.layers[:-1]), self.logits]
        return torch.cat([self._forward(graphs, piece) for piece in micro_batches])

    @contextmanager
    def traced(self, device: torch.device) -> Iterator[Tracer]:
        """Note when each operator of the steps inside starts and ends."""
        tracer = self._executor.tracer = Tracer(self.layers, device)
        try:
            yield tracer
        finally:
            self._executor.tracer = None

    def capture(self, micro_batch: MicroBatch) -> dict[tuple[str, str], list[Any]]:
        """What each kind of operator reads, by graph fingerprint and operator name.

        Runs the micro-batch forward and backward with nothing overlapped. Its gradients are
        added to `main_grad` as ever, so call it between a step and the next one's clearing.
        """
        found: dict[tuple[str, str], list[Any]] = {}
        graphs = [graph for pair in self.layers for graph in (pair.forward, pair.backward)]
        kinds = {id(operator): graph for graph in graphs for operator in graph.operators}

        def observe(entry: Entry, values: list[Any]) -> None:
            key = (kinds[id(entry.operator)].fingerprint, entry.operator.name)
            if key not in found:
                # Copies: some operators overwrite what they read.
                found[key] = [v.clone() if isinstance(v, Tensor) else v for v in values]

        self._watch(micro_batch, observe)
        return found

    def issue_seconds(self, micro_batch: MicroBatch) -> float:
        """Seconds between the launches of two operators, where the host waits for nothing.

        Adds to gradients as `capture` does.
        """
        moments: list[float] = []
        self._watch(micro_batch, lambda entry, values: moments.append(time.perf_counter()))
        # Later ones may wait for room in the device's queue.
        return median(b - a for a, b in pairwise(moments[:_QUEUED]))

    def _watch(self, micro_batch: MicroBatch, observer: Observer) -> None:
        """Show `observer` every operator of one micro-batch, with nothing overlapped."""
        builder, self._executor.observer = self._builder, observer
        self.install(BUILDERS["sequential"])
        try:
            self.train([micro_batch])
        finally:
            self._executor.observer = None
            self.install(builder)

    def _pass(self, step: Pass, walks: dict[int, Walk], on_gradient: OnGradient | None) -> None:
        """Forward from the first layer to the last, backward from the last to the first."""
        ahead = walks[step.forward] if step.forward is not None else None
        behind = walks[step.backward] if step.backward is not None else None
        last = len(self.layers) - 1
        previous: Job | None = None
        for index in range(last + 1):
            job = self._enter_pair(index, ahead, behind)
            if previous is not None and previous.program.plan is not job.program.plan:
                self._executor.finish(previous, on_gradient)
                previous = None
            self._executor.run(job, previous, on_gradient)
            self._leave_pair(index, job, ahead, behind)
            previous = job if job.program.leaves else None
        if previous is not None:
            self._executor.finish(previous, on_gradient)
        if behind is not None:
            left = {i: tape.names() for i, tape in behind.tapes.items() if tape.names()}
            assert not left, f"slots outlive their micro-batch: {left}"

    def _enter_pair(self, index: int, ahead: Walk | None, behind: Walk | None) -> Job:
        """Forward of layer `index` beside backward of its mirror image, as far as they are."""
        mirror = len(self.layers) - 1 - index
        tapes = {}
        if ahead is not None:
            pair = self.layers[index]
            tapes[Strand.FORWARD] = self._open(ahead, index, pair.forward, pair.backward)
        if behind is not None:
            tapes[Strand.BACKWARD] = behind.tapes[mirror]
            self._hand(behind, behind.tapes[mirror], self.layers[mirror].backward)
        program = self._program(
            index if ahead is not None else None, mirror if behind is not None else None
        )
        return Job(program, tapes)

    def _leave_pair(self, index: int, job: Job, ahead: Walk | None, behind: Walk | None) -> None:
        mirror = len(self.layers) - 1 - index
        if ahead is not None:
            ahead.carried = job.tapes[Strand.FORWARD].take(self.layers[index].forward.outputs)
        if behind is not None:
            behind.carried = job.tapes[Strand.BACKWARD].take(self.layers[mirror].backward.outputs)

    def _forward(self, graphs: Sequence[Graph], piece: MicroBatch) -> Tensor:
        with torch.no_grad():
            # Without a key nothing random happens: no dropout.
            walk = self._enter(replace(piece, slots={**piece.slots, "batch.key": None}))
            for index, graph in enumerate(graphs):
                tape = self._open(walk, index, graph, None)
                self._executor.run(Job(self._evaluation(graph), {Strand.FORWARD: tape}))
                walk.carried = tape.take(graph.outputs)
                del walk.tapes[index]
            # The caller's tensors, the micro-batch, must outlive every lane's use of them.
            self.lanes.barrier()
            return self._leave(walk)

    def _enter(self, piece: MicroBatch) -> Walk:
        batch = Tape(Counter(dict.fromkeys(piece.slots, 1)))
        for name, slot in self.lanes.constants(piece.slots).items():
            batch.put(name, slot)
        return Walk(batch)

    def _open(self, walk: Walk, index: int, graph: Graph, follows: Graph | None) -> Tape:
        counts = graph.readers + follows.readers if follows else Counter(graph.readers)
        tape = walk.tapes[index] = Tape(counts, walk.batch)
        self._hand(walk, tape, graph)
        return tape

    def _hand(self, walk: Walk, tape: Tape, graph: Graph) -> None:
        """Put what the last graph handed over on the tape of the next."""
        for name, slot in zip(graph.inputs, walk.carried, strict=True):
            if not tape.put(name, slot) and not slot.holders:
                self.lanes.release(slot)
        walk.carried = []

    def _leave(self, walk: Walk) -> Tensor:
        """The last graph's only output."""
        (slot,) = walk.carried
        walk.carried = []
        value: Tensor = self.lanes.hand_out(slot)
        return value

    def _program(self, forward: int | None, backward: int | None) -> Program:
        """The program of layer `forward` beside layer `backward`, made on first use."""
        key = (forward, backward)
        if key not in self._programs:
            ahead = self.layers[forward] if forward is not None else None
            behind = self.layers[backward].backward if backward is not None else None
            graph, follows = (ahead.forward, ahead.backward) if ahead else (None, None)
            self._programs[key] = bind(self._plan(graph, behind), graph, behind, follows)
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
