"""A stage rehearses all that it launches later, and nothing is left of it.

What a kernel is chosen by is noted of every launch: the operator, whether it leaves processors to
communication, whether its inputs are copied for a profile, whether it adds to a gradient first, and
how its tensors lie in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import BatchNorm1d, Linear, Module

from lightning_dhellam.engine import Engine, MicroBatch
from lightning_dhellam.engine.executor import Entry, Executor
from lightning_dhellam.engine.lanes import CpuLanes, CudaLanes
from lightning_dhellam.engine.rehearsal import Rehearsals
from lightning_dhellam.engine.tape import Tape, tensors
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.gradients import _OLD, aside
from lightning_dhellam.pipeline.schedules import SCHEDULES, Placement
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import (
    CPU,
    LoadingLanes,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    train,
)
from tests.models.llama import SMALL
from tests.plan.graphs import sparing
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=8, tie_embeddings=True, hidden_dropout=0.1)
SPLIT = (2, 2, 2, 2)
LENGTH = 15
"""Odd, so that a micro-batch within a batch begins at another place than at the multiple of 16."""
_PLACES = 32


class Launches:
    """What an engine launches, in rehearsals and in steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rehearsed: set[tuple[Any, ...]] = set()
        self.new: list[str] = []
        issue = Executor._issue

        def noted(executor: Executor, entry: Entry, tape: Tape) -> None:
            inputs = [tape[name].value for name in entry.operator.reads]
            how = (entry.spare, executor.observer is not None)
            key = (entry.label, *how, _first(entry), _layout(inputs), _places(entry))
            if executor._rehearsing:
                self.rehearsed.add(key)
            elif key not in self.rehearsed:
                self.new.append(str(key))
            issue(executor, entry, tape)

        monkeypatch.setattr(Executor, "_issue", noted)


def _first(entry: Entry) -> tuple[bool, ...]:
    return tuple(bool(p.__dict__.get(_OLD)) for p in entry.operator.accumulates)


def _places(entry: Entry) -> tuple[int, ...]:
    return tuple(p.main_grad.data_ptr() % _PLACES for p in entry.operator.accumulates)


def _layout(values: list[Any]) -> tuple[Any, ...]:
    found = [tensor for value in values for tensor in tensors(value)]
    return tuple((t.dtype, t.shape, t.stride(), t.data_ptr() % _PLACES) for t in found)


class Turned(Module):
    """A user's block that hands over what is not contiguous, counts, and has an odd parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.odd = torch.nn.Parameter(torch.ones(1))
        self.norm = BatchNorm1d(width)
        self.mix = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1)).view(x.shape) * self.odd + torch.rand(())
        return self.mix(y).transpose(0, 1).contiguous().transpose(0, 1)


def _engine(context: ParallelContext, *, loads: bool = True) -> tuple[Engine, CausalLM]:
    model = CausalLM(CONFIG, context)
    # At the end of a chunk: its output is sent.
    for index in (1, 3):
        model.layers[index] = Turned(CONFIG.hidden_size)
    model.settle()
    add_main_grads(model)
    lowered = lower(model)
    lanes = LoadingLanes() if loads else CpuLanes()
    builder = BUILDERS["interleaved"]
    return Engine(lowered.layers, lanes, builder, lowered.logits, lowered.stage, model), model


def _new_launches(rank: int) -> dict[str, list[str]]:
    context = ParallelContext.create(CPU, pipeline_parallel_size=2, pipeline_split=SPLIT)
    engine, model = _engine(context)
    found: dict[str, list[str]] = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        launches = Launches(monkeypatch)

        @contextmanager
        def step(name: str) -> Iterator[None]:
            for parameter in model.parameters():
                setattr(parameter, _OLD, True)
            yield
            found[name], launches.new = launches.new, []

        def batch(samples: int, size: int) -> list[Any]:
            return pieces(batch_of(CONFIG, samples, LENGTH), size, context)

        with step("one"):
            engine.train(batch(2, 2))
        with step("more of that shape"):
            engine.train(batch(6, 2))
        with step("uneven"):
            engine.train(batch(5, 2))
        with step("single samples"):
            engine.train(batch(4, 1))
        with step("further additions"):
            engine.train(batch(4, 1))
            engine.train(batch(4, 1))
        with step("evaluation"):
            engine.evaluate(batch(5, 2))
        with step("prediction"):
            engine.predict(batch(5, 2))
        engine.install(sparing("megatron"))
        with step("another plan"):
            engine.train(batch(5, 2))
        with step("capture"):
            engine.capture(batch(1, 1)[0])
    return found


def test_every_launch_of_a_step_was_rehearsed() -> None:
    for outcome in run_ranks(2, _new_launches):
        assert outcome == {name: [] for name in outcome}
        assert len(outcome) == 9


def _rehearsals(rank: int) -> dict[str, Any]:
    """What a stage does alone before steps, and what that leaves behind."""
    context = ParallelContext.create(CPU, pipeline_parallel_size=2)
    model = CausalLM(CONFIG, context)
    add_main_grads(model)
    lowered = lower(model)
    lanes = LoadingLanes(poison=True)
    engine, plain = engine_of(lowered, lanes=lanes), engine_of(lowered)
    micro_batches = pieces(batch_of(CONFIG, 5, LENGTH), 2, context)  # the last one is smaller
    found: dict[str, Any] = {"shapes": []}
    once = engine._rehearsals.once

    def noted(alone: list[MicroBatch], *rest: Any, **more: Any) -> None:
        key = alone[0].slots["batch.key"]
        found["shapes"].append((len(alone), key is not None))
        once(alone, *rest, **more)

    engine._rehearsals.once = noted  # type: ignore[method-assign]
    expected = train(plain, model, micro_batches)
    random = torch.get_rng_state()
    found["first"] = differing(train(engine, model, micro_batches), expected)
    after_one = list(found["shapes"])
    # Gradients are added to those that are there, as with accumulation over batches.
    engine.train(micro_batches)
    again = {n: p.main_grad.clone() for n, p in model.named_parameters()}
    add_main_grads(model)
    for _ in range(2):
        plain.train(micro_batches)
    found["accumulated"] = [
        n for n, p in model.named_parameters() if not torch.equal(p.main_grad, again[n])
    ]
    engine.evaluate(micro_batches)
    engine.install(BUILDERS["megatron"])
    engine.train(micro_batches[:1])
    engine.install(BUILDERS["interleaved"])
    engine.train(micro_batches)
    found["random"] = torch.equal(random, torch.get_rng_state())
    return {**found, "after one": after_one}


def test_a_stage_rehearses_every_shape_and_plan_once_and_leaves_nothing_behind() -> None:
    for outcome in run_ranks(2, _rehearsals):
        assert outcome["first"] == outcome["accumulated"] == []
        assert outcome["random"]
        assert outcome["after one"] == [(3, True), (3, True)]
        more = outcome["shapes"][2:]
        # Evaluation with both shapes, one micro-batch with another plan, nothing when it is back.
        assert more == [(3, False), (3, False), (1, True)]


def _left(rank: int) -> dict[str, Any]:
    """Buffers, random numbers and traces with rehearsals and without."""
    context = ParallelContext.create(CPU, pipeline_parallel_size=2, pipeline_split=SPLIT)
    found: dict[str, Any] = {}
    outcomes = []
    for loads in (False, True):
        torch.manual_seed(3)
        engine, model = _engine(context, loads=loads)
        torch.manual_seed(4)
        micro_batches = pieces(batch_of(CONFIG, 5, LENGTH), 2, context)
        with engine.traced(CPU) as tracer:
            loss = engine.train(micro_batches)
        gradients = [p.main_grad for p in model.parameters()]
        outcomes.append([loss, torch.get_rng_state(), *model.buffers(), *gradients])
        found[f"traced {loads}"] = len(tracer.spans())
    same = [torch.equal(a, b) for a, b in zip(*outcomes, strict=True)]
    return {**found, "same": same}


def test_nothing_is_left_of_a_rehearsal() -> None:
    for outcome in run_ranks(2, _left):
        assert all(outcome["same"])
        assert outcome["traced False"] == outcome["traced True"] > 0


def test_gradients_and_their_marks_are_as_before() -> None:
    flat = torch.arange(9.0)
    odd, whole, frozen = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 2))
    odd.main_grad, whole.main_grad = flat[1:4], flat[4:8]  # type: ignore[attr-defined]
    setattr(odd, _OLD, True)
    with aside([odd, whole, odd, frozen]):
        for parameter, own in ((odd, flat[1:4]), (whole, flat[4:8])):
            assert parameter.__dict__.pop(_OLD)
            assert parameter.main_grad.data_ptr() % 512 == own.data_ptr() % 512
            parameter.main_grad.fill_(-1.0)
    assert torch.equal(flat, torch.arange(9.0))
    assert odd.main_grad.data_ptr() == flat[1:].data_ptr()
    assert odd.__dict__[_OLD] and not whole.__dict__[_OLD]
    assert not hasattr(frozen, "main_grad")


_FOLD = Placement.folded(2)


@pytest.mark.parametrize(("schedule", "fewest"), [("fold", 3), ("zb-v", 3), ("dualpipe-v", 4)])
def test_a_rehearsal_walks_in_every_way_of_a_step(schedule: str, fewest: int) -> None:
    for number in (0, 1):
        stage = Stage(number, _FOLD, (3, 2), SCHEDULES[schedule])
        assert stage.fewest(12) <= fewest and stage.fewest(1) == 1
        for count in range(1, 13):
            of_few, of_all = (stage.step(n).kinds() for n in (stage.fewest(count), count))
            assert {*of_few} == {*of_all} <= {*stage.kinds()}


def _sent(rank: int) -> int:
    context = ParallelContext.create(CPU, pipeline_parallel_size=2, pipeline_split=SPLIT)
    engine, _ = _engine(context)
    graphs = [graph for pair in engine.layers for graph in (pair.forward, pair.backward)]
    sends = [operator for graph in graphs for operator in graph.sends]
    for operator in sends:
        (rehearsal,) = operator.rehearsals
        value = Mock()
        assert rehearsal(value) is None
        value.contiguous.assert_called_once_with()
    return len(sends)


def test_what_is_sent_is_made_contiguous_as_in_a_step() -> None:
    assert run_ranks(2, _sent) == [2, 2]


def test_gpus_load_kernels() -> None:
    assert CudaLanes.loads


def _failing(rank: int) -> str:
    context = ParallelContext.create(CPU, pipeline_parallel_size=2, pipeline_split=SPLIT)
    engine, _ = _engine(context)

    def fail(*_: Any) -> Tensor:
        raise ArithmeticError("no such value")

    Turned.forward = fail  # type: ignore[method-assign]
    try:
        engine.train(pieces(batch_of(CONFIG, 2, LENGTH), 2, context))
    except ArithmeticError as error:
        return "".join(getattr(error, "__notes__", []))
    return ""


def test_an_error_says_that_the_data_was_made_up() -> None:
    for note in run_ranks(2, _failing):
        assert note.endswith("module, while its stage rehearsed on made-up data")


def test_what_a_rehearsal_adds_up_counts_for_no_step() -> None:
    rehearsals = Rehearsals(Executor(LoadingLanes()), (), Stage(0, _FOLD, (2, 2)))
    given = pieces(batch_of(SMALL, 2, 8), 1, ParallelContext.single(CPU))
    seen: list[MicroBatch] = []
    rehearsals.once(given, seen.extend)
    for own, piece in zip(seen, given, strict=True):
        differs = {name for name, value in piece.slots.items() if own.slots[name] is not value}
        assert differs == {"batch.tally"} and own.tokens == piece.tokens
