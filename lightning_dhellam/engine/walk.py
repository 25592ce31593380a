"""Walks micro-batches through the layers of a stage as the works of a step say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.executor import Executor, Job, OnGradient, receives
from lightning_dhellam.engine.programs import Programs
from lightning_dhellam.engine.state import StepState
from lightning_dhellam.engine.tape import Slot
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.pipeline.stage import Leg, Step
from lightning_dhellam.plan import BEGIN, Graph, Operator, Strand


class Walker:
    """Carries out the walks of a step: two strands at a time, or forward alone.

    Args:
        lanes: of this rank's device.
        executor: runs programs on them.
        programs: of this rank's layers.
    """

    def __init__(self, lanes: Lanes, executor: Executor, programs: Programs) -> None:
        self._lanes = lanes
        self._executor = executor
        self._programs = programs

    def train(
        self,
        micro_batches: Sequence[MicroBatch],
        step: Step,
        on_gradient: OnGradient | None = None,
    ) -> list[Tensor]:
        """Walk forward and backward. Returns the losses that this stage has."""
        state = StepState(micro_batches, self._lanes, self._programs.readers)
        losses: list[Tensor] = []
        final = len(micro_batches) - 1
        for leg in self._legs(state, step, [pair.forward for pair in self._programs.layers]):
            self._pass(leg, state, on_gradient if leg.backward == final else None)
            losses += self._results(state, leg)
        return losses

    def ahead(
        self, micro_batches: Sequence[MicroBatch], step: Step, graphs: Sequence[Graph]
    ) -> list[Tensor]:
        """Walk forward only. Returns what the last graph hands over, where it is."""
        state = StepState(micro_batches, self._lanes, lambda layer: Counter(graphs[layer].readers))
        found: list[Tensor] = []
        for leg in self._legs(state, step, graphs):
            assert leg.forward is not None
            for layer, _ in leg.pairs:
                assert layer is not None
                tape = state.enter(leg.forward, layer, graphs[layer])
                program = self._programs.of_one(graphs[layer])
                self._executor.run(Job(program, {Strand.FORWARD: tape}))
                state.leave(leg.forward, layer, graphs[layer])
                state.close(leg.forward, layer)
            found += self._results(state, leg)
        return found

    def beside(self, operators: Sequence[Operator], on_gradient: OnGradient | None = None) -> None:
        """Run a prologue or an epilogue."""
        if not operators:
            return
        slots = self._lanes.constants({BEGIN: None})
        for operator in operators:
            inputs = [slots[name] for name in operator.reads]
            launched = self._executor.wrapped(operator)
            with self._executor.named(f"step/{operator.name}"):
                value, mark = self._lanes.launch(launched, inputs, crosses=True)
            slots |= {name: Slot(value, mark) for name in operator.writes}
            if operator.accumulates and on_gradient is not None:
                on_gradient(operator.accumulates)

    def _legs(self, state: StepState, step: Step, forwards: Sequence[Graph]) -> Iterator[Leg]:
        """The walks of a step. The receives of the next are hidden under this one."""
        for layer, graph in enumerate(forwards):
            for operator in graph.preparation:
                state.prepare(layer, self._executor.prepare(operator))
        self._post(state, step.legs[0], forwards)
        last = step.last
        for index, leg in enumerate(step.legs):
            self._lanes.settle(step.ahead)
            for following in step.legs[index + 1 : index + 2]:
                self._post(state, following, forwards)
            yield leg
            for micro_batch in {leg.forward, leg.backward}:
                if micro_batch is not None and last[micro_batch] == index:
                    state.end(micro_batch)
        state.finish()
        # The caller's tensors, the micro-batches, must outlive every lane's use of them.
        self._lanes.drain()

    def _results(self, state: StepState, leg: Leg) -> list[Tensor]:
        """What the model's last layer has handed over in a walk: the loss, or logits."""
        ends = any(forward == len(self._programs.layers) - 1 for forward, _ in leg.pairs)
        return state.results(leg.forward) if ends and leg.forward is not None else []

    def _post(self, state: StepState, leg: Leg, forwards: Sequence[Graph]) -> None:
        """Issue what the first graph of each strand receives from another stage."""
        for strand, layer in leg.begins:
            micro_batch = leg.forward if strand is Strand.FORWARD else leg.backward
            assert micro_batch is not None
            ahead = strand is Strand.FORWARD
            graph = forwards[layer] if ahead else self._programs.backward(layer, leg.part)
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
            graph = self._programs.layers[forward].forward
            tapes[Strand.FORWARD] = state.enter(leg.forward, forward, graph)
        if backward is not None:
            assert leg.backward is not None
            graph = self._programs.backward(backward, leg.part)
            tapes[Strand.BACKWARD] = state.enter(leg.backward, backward, graph)
        program = self._programs.of_pair(forward, backward, leg.part)
        return Job(program, tapes) if program is not None else None

    def _leave_pair(
        self, state: StepState, leg: Leg, forward: int | None, backward: int | None
    ) -> None:
        if forward is not None:
            assert leg.forward is not None
            state.leave(leg.forward, forward, self._programs.layers[forward].forward)
        if backward is not None:
            assert leg.backward is not None
            state.leave(leg.backward, backward, self._programs.backward(backward, leg.part))
