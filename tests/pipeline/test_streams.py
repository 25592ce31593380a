"""What waits for what on CUDA, on streams that only keep the books.

A middle stage of three walks whole steps on `CudaLanes`. Each stream knows what has happened before
its next operator: what ran on it, and what it was told to wait for. So a read before its write, a
memory that is used again before its last read, and a wait that nobody needs are all seen without a
GPU, and whatever the times would be.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine import Engine, MicroBatch
from lightning_dhellam.engine.executor import Entry
from lightning_dhellam.engine.lanes import CudaLanes
from lightning_dhellam.engine.tape import Slot, tensors
from lightning_dhellam.pipeline.schedules import (
    SCHEDULES,
    Edge,
    Placement,
    Scheme,
    fold,
    peak_activations,
)
from lightning_dhellam.pipeline.schedules.named import Written
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import (
    BEGIN,
    BUILDERS,
    Builder,
    Ends,
    Graph,
    GraphPair,
    Lane,
    Operator,
    Strand,
)
from lightning_dhellam.plan.offloading import ALL, offload
from tests.pipeline.random_schedules import random_schedule
from tests.plan.graphs import random_builder
from tests.streams import Moment, Streams

STAGE, STAGES = 1, 3
FOLDED, STRAIGHT = Placement.folded(STAGES), Placement.straight(STAGES, 2)


@dataclass
class Value:
    """What an operator writes, and who has read it or a view of it."""

    written: Moment
    name: str
    reads: list[Moment] = field(default_factory=list)


class Books(Streams):
    """All streams, what each knows to have happened, and what was written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, Value] = {}
        self.received: dict[Moment, Value] = {}
        self.early: list[str] = []
        self.order: list[str] = []

    def of(self, value: Any) -> list[Value]:
        """What is noted of the storages of a slot's value."""
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors(value)]
        return [self.values[place] for place in places if place in self.values]

    def run(self, name: str, *values: Any) -> Tensor:
        """An operator on the current stream, which allocates what it writes."""
        self.order.append(name)
        stream = self.current
        number = self.known[stream].get(stream, 0) + 1
        self.known[stream][stream] = number
        for value in self.of(values):
            assert self.knows(stream, value.written), f"{name} reads {value.name} too early"
            value.reads.append((stream, number))
        allocated, written = torch.empty(1), Value((stream, number), name)
        self.values[allocated.untyped_storage().data_ptr()] = written
        if name.endswith(".receive"):
            self.received[written.written] = written
        if name.endswith(".send"):
            self._note_needless_waits(name)
        return allocated

    def _note_needless_waits(self, name: str) -> None:
        for moment, value in self.received.items():
            if self.knows(self.current, moment) and not value.reads:
                self.early.append(f"{name} waits for {value.name}, which nobody has read")


class CheckedLanes(CudaLanes):
    """Refuses to free what somebody may still read, and counts what is still to be freed."""

    def __init__(self, books: Books) -> None:
        super().__init__(torch.device("cuda"))
        self.books = books
        self.most_waiting = 0

    def _drop(self, slot: Slot) -> None:
        for value in self.books.of(slot.value):
            owner = value.written[0]
            for moment in value.reads:
                assert self.books.knows(owner, moment), f"{value.name} is freed too early"
        super()._drop(slot)

    def settle(self, ahead: int) -> None:
        super().settle(ahead)
        self.most_waiting = max(self.most_waiting, sum(map(len, self._waiting.values())))


def _layers(books: Books, placement: Placement) -> list[GraphPair]:
    """Two layers in each chunk, every one with a collective in each direction.

    Each keeps a view of its input beside what autograd would allocate, as a user's module does.
    """

    def operator(
        name: str, lane: Lane, reads: tuple[str, ...], writes: tuple[str, ...], edge: str = ""
    ) -> Operator:
        def run(*values: Any) -> Any:
            value = books.run(name, *values)
            if "graph" in writes:
                return value, (values[0][:], value)
            return value if writes else None

        return Operator(name, lane, reads, writes, run, cost=1.0, edge=edge)

    def transfer(slot: str, source: int, target: int, strand: Strand, kind: str) -> Operator:
        edge = str(Edge(source, target, strand))
        slots = ((slot,), ()) if kind == "send" else (("batch.tokens",), (slot,))
        made_up = operator(f"{slot}.made_up", Lane.PP, *slots, edge).run
        return replace(operator(f"{slot}.{kind}", Lane.PP, *slots, edge), rehearsals=(made_up,))

    def pair(before: int | None, after: int | None) -> GraphPair:
        forward = (
            operator("gather", Lane.TP, ("x",), ("whole",)),
            operator("gemm", Lane.COMPUTE, ("whole",), ("act",)),
            operator("module", Lane.COMPUTE, ("x",), ("out", "graph")),
            operator("residual", Lane.COMPUTE, ("act", "out"), ("y",)),
        )
        backward = (
            operator("grad_gather", Lane.TP, ("dy",), ("d_whole",)),
            operator("dgrad", Lane.COMPUTE, ("d_whole", "act"), ("d_act",)),
            operator("wgrad", Lane.COMPUTE, ("d_whole", "whole"), ()),
            operator("module.grad", Lane.COMPUTE, ("dy", "graph"), ()),
            operator("grad_sum", Lane.COMPUTE, ("d_act", "dy"), ("dx",)),
        )
        ahead, behind = Strand.FORWARD, Strand.BACKWARD
        ends: dict[str, tuple[Operator, ...]] = {"fr": (), "fs": (), "br": (), "bs": ()}
        if before is not None:
            ends["fr"] = (transfer("x", before, STAGE, ahead, "receive"),)
            ends["bs"] = (transfer("dx", STAGE, before, behind, "send"),)
        if after is not None:
            ends["fs"] = (transfer("y", STAGE, after, ahead, "send"),)
            ends["br"] = (transfer("dy", after, STAGE, behind, "receive"),)
        return GraphPair(
            Graph("toy", ahead, forward, ("x",), ("y",), receives=ends["fr"], sends=ends["fs"]),
            Graph("toy", behind, backward, ("dy",), ("dx",), receives=ends["br"], sends=ends["bs"]),
        )

    found = []
    for chunk in placement.held(STAGE):
        found.append(pair(placement.stage_of[chunk - 1], None))
        found.append(pair(None, placement.stage_of[chunk + 1]))
    return found


def _ends(books: Books) -> Ends:
    """What comes before a step and is read, and what is made behind it and sent."""

    def operator(
        name: str, lane: Lane, reads: tuple[str, ...], writes: tuple[str, ...], edge: str = ""
    ) -> Operator:
        def run(*values: Any) -> Any:
            value = books.run(name, *values)
            return value if writes else None

        return Operator(name, lane, reads, writes, run, edge=edge)

    ahead, back = Edge(0, STAGE, Strand.FORWARD), Edge(STAGE, 0, Strand.BACKWARD)
    return Ends(
        (
            operator("w.receive", Lane.PP, (BEGIN,), ("step.w",), str(ahead)),
            operator("w.begin", Lane.COMPUTE, ("step.w",), ()),
        ),
        (
            operator("dw.end", Lane.COMPUTE, (), ("step.dw",)),
            operator("dw.give", Lane.PP, ("step.dw",), (), str(back)),
        ),
    )


def _step(
    builder: Builder,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
    scheme: Scheme = fold,
    placement: Placement = FOLDED,
    offloads: bool = False,
) -> tuple[Books, CheckedLanes]:
    books = Books()
    books.install(monkeypatch)
    lanes = CheckedLanes(books)
    layers = _layers(books, placement)
    if offloads:
        away, back = (partial(books.run, name) for name in ("away", "back"))
        layers = [offload(pair, ALL, away, back) for pair in layers]
    engine = Engine(
        layers,
        lanes,
        builder,
        stage=Stage(STAGE, placement, (2, 2), scheme),
        ends=_ends(books),
    )

    def observe(entry: Entry, values: list[Any]) -> None:
        for value in books.of(tuple(values)):
            known = books.knows(books.current, value.written)
            assert known, f"{entry.label} is shown {value.name} too early"

    engine._executor.observer = observe
    tokens = torch.zeros(1, 4, dtype=torch.long)
    pieces = [MicroBatch({"batch.tokens": tokens, "batch.key": None}, 4)] * count
    engine.train(pieces)
    engine.evaluate(pieces)
    assert lanes.ledger.slots == 0
    assert not any(lanes._waiting.values()), "memory is held beyond the step"
    return books, lanes


PLANS: dict[str, Builder] = BUILDERS | {f"random-{s}": random_builder(s) for s in range(20)}


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_read_or_freed_too_early_and_no_send_waits_for_a_receive(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    books, _ = _step(PLANS[plan], 5, monkeypatch)
    both = fold(STAGES, 5), fold(STAGES, 5).forward_only()
    visits = sum(len(schedule.visits[STAGE]) for schedule in both)
    assert len(books.received) > visits / 2
    assert books.early == []
    # A send starts as soon as its tensor is there, and receives are posted before the visit.
    pairs = list(pairwise(books.order))
    assert {first for first, then in pairs if then == "y.send"} == {"residual"}
    assert {first for first, then in pairs if then == "dx.send"} == {"grad_sum"}


@pytest.mark.parametrize("name", ["zb-v", "dualpipe-v", *map(str, range(6))])
def test_halves_of_backward_read_nothing_too_early_either(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEDULES.get(name) or Written(random_schedule(int(name), FOLDED, 7), "random")
    for plan in ("interleaved", "random-0", "random-1"):
        books, _ = _step(PLANS[plan], 7, monkeypatch, scheme)
        assert books.early == [] and books.received
        pairs = list(pairwise(books.order))
        assert {first for first, then in pairs if then == "dx.send"} == {"grad_sum"}


@pytest.mark.parametrize("name", ["interleaved-1f1b", *map(str, range(3))])
def test_chunks_that_go_round_read_nothing_too_early(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = SCHEDULES.get(name) or Written(random_schedule(int(name), STRAIGHT, 7), "random")
    for plan in ("interleaved", "random-0"):
        books, _ = _step(PLANS[plan], 7, monkeypatch, scheme, STRAIGHT)
        assert books.early == [] and books.received
        assert books.order.count("w.begin") == 2 and books.order[-1] != "dw.give"
        assert books.order.count("dw.give") == 1


@pytest.mark.parametrize("name", ["fold", "zb-v"])
def test_copies_both_ways_run_at_once_and_no_buffer_is_taken_before_it_was_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for a slot on the host is freed on the stream that will write its buffer."""
    for plan in ("interleaved", "sequential", *(f"random-{seed}" for seed in range(4))):
        books, lanes = _step(PLANS[plan], 5, monkeypatch, SCHEDULES[name], offloads=True)
        copies = {value.name: value.written[0] for value in books.values.values()}
        streams = {lanes.stream(lane).number for lane in (Lane.OFFLOAD, Lane.FETCH)}  # type: ignore[attr-defined]
        assert {copies["away"], copies["back"]} == streams and len(streams) == 2
        assert books.early == []


def test_compute_gives_a_lead_to_what_goes_first_and_to_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    books, lanes = _step(PLANS["random-0"], 5, monkeypatch)
    assert set(books.slept) == {lanes.stream(Lane.COMPUTE).number}  # type: ignore[attr-defined]
    assert _step(BUILDERS["sequential"], 5, monkeypatch)[0].slept == []


def test_memory_of_transfers_comes_back_while_the_step_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CheckedLanes, "loads", False)  # of the step, without its rehearsal

    def most(count: int) -> int:
        return _step(BUILDERS["interleaved"], count, monkeypatch)[1].most_waiting

    short, long = most(2 * STAGES), most(8 * STAGES)
    assert short == long <= peak_activations(fold(STAGES, 6).visits[STAGE])


def _broken(
    name: str, replacement: Any, monkeypatch: pytest.MonkeyPatch, of: type = CudaLanes
) -> pytest.ExceptionInfo[AssertionError]:
    monkeypatch.setattr(of, name, replacement)
    with pytest.raises(AssertionError) as error:
        _step(BUILDERS["interleaved"], 5, monkeypatch)
    return error


def test_the_books_find_a_missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "too early" in str(_broken("_wait", lambda *_: None, monkeypatch).value)


def test_the_books_find_memory_that_is_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is freed too early" in str(_broken("_passed", lambda *_: True, monkeypatch).value)


def test_the_books_find_a_view_that_is_freed_where_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = _broken("borrow", lambda *_: None, monkeypatch, Slot)
    assert "is freed too early" in str(error.value)
