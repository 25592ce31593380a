"""Issues the operators of a plan: a short interpreter, the dispatch is data.

Two layers of two micro-batches, `interleaved`. A layer's first gather waits only for its input,
so it may run under what the previous pair of layers still computes:

    compute  | norm  dgrad  qkv  attention.grad  attention  wgrad | norm  dgrad ...
    tp       |   gather     grad_gather     scatter               |  gather ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.profiler import record_function

from lightning_dhellam.engine.tape import Slot, Tape
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.plan import (
    SHARED,
    Graph,
    Issue,
    Operator,
    Plan,
    Strand,
    validate,
)

OnGradient = Callable[[tuple[Any, ...]], None]
"""Called with the parameters whose gradient an operator has just been given to add to."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One operator of a program.

    Attributes:
        operator: what runs.
        strand: of its micro-batch.
        lag: 1 when it belongs to the previous pair of layers.
        reads: each slot once, without those of the micro-batch itself.
        crosses: whether an operator of another lane, or the host, reads what it writes.
        first: whether it begins before the compute operator that follows.
        spare: whether it leaves processors to communication.
        label: its name in traces.
        then: transfers that start as soon as it was issued.
    """

    operator: Operator
    strand: Strand
    lag: int
    reads: tuple[str, ...]
    crosses: bool
    first: bool
    spare: bool
    label: str
    then: tuple[Entry, ...] = ()


Wrap = Callable[[Operator, Operator], Operator]
"""Makes what is run in the place of an operator, which does the same and something beside: of that
operator, by which the wrap knows it, and of what other wraps have made of it, which is to run."""

Observer = Callable[[Entry, list[Any]], None]
"""Called with each operator and the values that it is about to read: on its lane, when they are
there."""


@dataclass(frozen=True, slots=True)
class Program:
    """A plan bound to the graphs of one pair of layers.

    Attributes:
        plan: pairs of layers with the same one can leave work to each other.
        entries: one for each row; None is a barrier.
        leaves: whether some of its operators are left for the next pair.
    """

    plan: Plan
    entries: tuple[Entry | None, ...]
    leaves: bool


@dataclass(frozen=True, slots=True)
class Job:
    """A program and the tapes of the micro-batches that it is carried out for."""

    program: Program
    tapes: Mapping[Strand, Tape]


def bind(
    plan: Plan,
    forward: Graph | None,
    backward: Graph | None,
    follows: Graph | None = None,
    rest: Graph | None = None,
) -> Program:
    """Bind a plan to the graphs that it was made for.

    `follows` is the backward graph of forward's own layer, which reads what forward saves, and
    `rest` the second half of backward, where that is the first, which reads what the first leaves.

    Raises:
        PlanError: the plan does not fit the graphs.
    """
    validate(plan, forward, backward)
    graphs = {Strand.FORWARD: (forward, follows), Strand.BACKWARD: (backward, rest)}
    entries = tuple(
        _entry(row, *graphs[row.strand]) if isinstance(row, Issue) else None for row in plan.rows
    )
    return Program(plan, entries, any(row.lag for row in plan.issues))


def _entry(row: Issue, graph: Graph | None, follows: Graph | None) -> Entry:
    assert graph is not None
    operator = graph.by_name[row.operator]
    readers = (*graph.operators, *(follows.operators if follows else ()))
    elsewhere = (o for o in readers if o.lane is not operator.lane or o.waits)
    foreign = {slot for o in elsewhere for slot in o.reads}
    foreign.update(graph.outputs)
    return Entry(
        operator,
        row.strand,
        row.lag,
        _own(operator.reads),
        not foreign.isdisjoint(operator.writes),
        row.first,
        row.spare,
        f"{row.strand}/{operator.name}",
        tuple(_transfer(o, graph) for o in graph.sends if {*o.reads} & {*operator.writes}),
    )


def receives(graph: Graph) -> tuple[Entry, ...]:
    """The transfers that bring a graph its inputs."""
    return tuple(_transfer(operator, graph) for operator in graph.receives)


def _transfer(operator: Operator, graph: Graph) -> Entry:
    label = f"{graph.direction}/{operator.name}"
    crosses = bool(operator.writes)
    reads = _own(operator.reads)
    return Entry(operator, graph.direction, 0, reads, crosses, False, False, label)


def _own(reads: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(slot for slot in dict.fromkeys(reads) if not slot.startswith(SHARED))


class Executor:
    """Runs programs on lanes.

    Args:
        lanes: of this rank's device.
    """

    def __init__(self, lanes: Lanes) -> None:
        self.lanes = lanes
        self.observer: Observer | None = None
        self.wraps: tuple[Wrap, ...] = ()
        self._rehearsing = False
        self._turn = 0

    @contextmanager
    def rehearsing(self, observer: Observer | None = None, turn: int = 0) -> Iterator[None]:
        """Let operators run what they rehearse by instead; only `observer` watches.

        One that rehearses by several runs that of this `turn`, counted round.
        """
        watching = self.observer, self.wraps
        self._rehearsing, self.observer, self.wraps = True, observer, ()
        self._turn = turn
        try:
            yield
        finally:
            self._rehearsing = False
            self.observer, self.wraps = watching

    def run(
        self, job: Job, previous: Job | None = None, on_gradient: OnGradient | None = None
    ) -> None:
        """Issue the operators of `job`, and what `previous`, of the same plan, left for it."""
        for index, entry in enumerate(job.program.entries):
            if entry is None:
                self.lanes.barrier()
            elif not entry.lag:
                self._trace(entry, job.tapes, on_gradient)
            elif previous is not None:
                left = previous.program.entries[index]
                assert left is not None
                self._trace(left, previous.tapes, on_gradient)

    def finish(self, job: Job, on_gradient: OnGradient | None = None) -> None:
        """Issue what `job` has left for a next pair that does not come."""
        for entry in job.program.entries:
            if entry is not None and entry.lag:
                self._trace(entry, job.tapes, on_gradient)

    def prepare(self, operator: Operator) -> dict[str, Slot]:
        """Run what is run once a step. Returns the slots that it writes, by name."""
        with self.named(f"step/{operator.name}"):
            result, mark = self.lanes.launch(self.wrapped(operator), (), crosses=False)
        values = result if len(operator.writes) > 1 else (result,)
        made = {n: Slot(value, mark) for n, value in zip(operator.writes, values, strict=True)}
        for slot in made.values():
            self.lanes.born(slot)
        return made

    @contextmanager
    def named(self, label: str) -> Iterator[None]:
        """Inside, an operator of that name is issued: so traces show it, and its errors."""
        try:
            if torch.autograd._profiler_enabled():
                with record_function(label):
                    yield
            else:
                yield
        except Exception as error:
            remark = ", while its stage rehearsed on made-up data" if self._rehearsing else ""
            error.add_note(f"raised by operator {label}{remark}")
            raise

    def wrapped(self, operator: Operator) -> Operator:
        """What is run in the place of `operator`."""
        made = operator
        for wrap in self.wraps:
            made = wrap(operator, made)
        return made

    def post(self, entries: Sequence[Entry], tape: Tape) -> None:
        """Issue receives, so that they are there when their graph's turn comes."""
        for entry in entries:
            self._trace(entry, {entry.strand: tape}, None)

    def _trace(
        self, entry: Entry, tapes: Mapping[Strand, Tape], on_gradient: OnGradient | None
    ) -> None:
        with self.named(entry.label):
            self._issue(entry, tapes[entry.strand])
        if on_gradient is not None and entry.operator.accumulates:
            on_gradient(entry.operator.accumulates)
        for transfer in entry.then:
            self._trace(transfer, tapes, None)

    def _issue(self, entry: Entry, tape: Tape) -> None:
        operator = entry.operator
        inputs = tape.slots(operator.reads)
        if operator.computes:
            self.lanes.share(entry.spare)
        launched = self.wrapped(operator)
        if self._rehearsing and operator.rehearsals:
            instead = operator.rehearsals[self._turn % len(operator.rehearsals)]
            launched = replace(operator, run=instead)
        if self.observer is not None:
            launched = _observed(launched, entry, self.observer)
        result, mark = self.lanes.launch(launched, inputs, entry.crosses, entry.first)
        writes = operator.writes
        values = result if len(writes) > 1 else (result,) if writes else ()
        for name, value in zip(writes, values, strict=True):
            slot = Slot(value, mark)
            if tape.put(name, slot):
                self.lanes.born(slot)
        for name in entry.reads:
            last = tape.read(name)
            if last is not None:
                self.lanes.release(last)


def _observed(operator: Operator, entry: Entry, observer: Observer) -> Operator:
    """The same operator, which shows `observer` what it reads."""

    def run(*values: Any) -> Any:
        observer(entry, list(values))
        return operator.run(*values)

    return replace(operator, run=run)
