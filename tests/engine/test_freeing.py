"""When slots are freed, compared with what the graphs and the plan say beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine.lanes import CpuLanes
from lightning_dhellam.engine.state import StepState
from lightning_dhellam.engine.tape import Ledger, Mark, Slot
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import Visit, fold, walks
from lightning_dhellam.pipeline.stage import Leg, Stage
from lightning_dhellam.plan import (
    BUILDERS,
    Builder,
    GraphPair,
    Issue,
    Lane,
    Operator,
    Plan,
    Strand,
    Track,
)
from lightning_dhellam.plan.passes import CHOICES
from tests.engine.harness import CPU, add_main_grads, batch_of, engine_of, pieces, train
from tests.models.llama import SMALL
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=3, hidden_dropout=0.1)
PLANS = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(12)}
Life = tuple[int, str, int]
"""Launch that writes a slot, the operator's name, launch that reads it last."""


class RecordingLanes(CpuLanes):
    """Notes at which launch each slot is born and released."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.lives: list[Life] = []
        self._born: dict[int, tuple[int, str, Slot]] = {}

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        self.launches.append(operator.name)
        return super().launch(operator, inputs, crosses, first)

    def born(self, slot: Slot) -> None:
        # The slot is kept, so that no other one can get its id.
        self._born[id(slot)] = (len(self.launches) - 1, self.launches[-1], slot)
        super().born(slot)

    def release(self, slot: Slot) -> None:
        at, name, _ = self._born.pop(id(slot))
        self.lives.append((at, name, len(self.launches) - 1))
        super().release(slot)

    def hand_out(self, slot: Slot) -> Any:
        self._born.pop(id(slot))
        return super().hand_out(slot)


Launched = tuple[int, int, Operator]
"""Micro-batch, layer and operator."""


def _walk(layers: Sequence[GraphPair], builder: Builder, micro_batches: int) -> Iterator[Launched]:
    """Every launch of a step, in order."""
    last = len(layers) - 1
    plans: dict[tuple[str, str], Plan] = {}
    for step, _ in walks(fold(1, micro_batches).visits[0]):
        strands = {work.strand: work.micro_batch for work in step}
        forward, backward = strands.get(Strand.FORWARD), strands.get(Strand.BACKWARD)
        previous: tuple[Plan, int] | None = None
        for index in range(last + 1):
            ahead = layers[index].forward if forward is not None else None
            behind = layers[last - index].backward if backward is not None else None
            key = (ahead.fingerprint if ahead else "", behind.fingerprint if behind else "")
            plan = plans.setdefault(key, builder(ahead, behind))
            if previous is not None and previous[0] is not plan:
                yield from (_launched(layers, step, previous[1], r) for r in _late(previous[0]))
                previous = None
            for row in plan.issues:
                if not row.lag:
                    yield _launched(layers, step, index, row)
                elif previous is not None:
                    yield _launched(layers, step, previous[1], row)
            previous = (plan, index)
        assert previous is not None
        yield from (_launched(layers, step, previous[1], row) for row in _late(previous[0]))


def _late(plan: Plan) -> list[Issue]:
    return [row for row in plan.issues if row.lag]


def _launched(layers: Sequence[GraphPair], step: Visit, index: int, row: Issue) -> Launched:
    (micro_batch,) = (work.micro_batch for work in step if work.strand is row.strand)
    if row.strand is Strand.FORWARD:
        return micro_batch, index, layers[index].forward.by_name[row.operator]
    mirror = len(layers) - 1 - index
    return micro_batch, mirror, layers[mirror].backward.by_name[row.operator]


def _static_lives(layers: Sequence[GraphPair], builder: Builder, micro_batches: int) -> list[Life]:
    """From the graphs and the plans alone: first write and last read of every slot."""
    written: dict[tuple[int, int, str], tuple[int, str]] = {}
    last_read: dict[tuple[int, int, str], int] = {}

    def of_writer(micro_batch: int, layer: int, slot: str) -> tuple[int, int, str]:
        """Follow a graph's input to the graph that writes it."""
        pair = layers[layer]
        if slot in pair.forward.inputs:
            return micro_batch, layer - 1, layers[layer - 1].forward.outputs[0]
        if slot in pair.backward.inputs:
            return micro_batch, layer + 1, layers[layer + 1].backward.outputs[0]
        return micro_batch, layer, slot

    for number, (micro_batch, layer, operator) in enumerate(_walk(layers, builder, micro_batches)):
        for slot in operator.reads:
            if not slot.startswith("batch."):
                last_read[of_writer(micro_batch, layer, slot)] = number
        for slot in operator.writes:
            written[micro_batch, layer, slot] = (number, operator.name)
    assert last_read.keys() <= written.keys()
    return sorted((*written[key], last) for key, last in last_read.items())


@pytest.mark.parametrize("recompute", CHOICES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_slot_is_released_by_its_last_reader(plan: str, recompute: str) -> None:
    context = ParallelContext.single(CPU)
    _compare_lives(plan, recompute, context)


def _compare_lives(plan: str, recompute: str, context: ParallelContext) -> None:
    builder = PLANS[plan]
    model = CausalLM(CONFIG, context)
    add_main_grads(model)
    lowered = lower(model, recompute=recompute)
    lanes = RecordingLanes()
    engine = engine_of(lowered, builder=builder, lanes=lanes)
    train(engine, model, pieces(batch_of(CONFIG, 3, 8), 1, context))
    order = [operator.name for *_, operator in _walk(lowered.layers, builder, 3)]
    assert lanes.launches == order
    assert sorted(lanes.lives) == _static_lives(lowered.layers, builder, 3)
    assert len(lanes.lives) > 100


def _on_rank(rank: int) -> list[tuple[int, int]]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    for plan in PLANS:
        for recompute in CHOICES:
            _compare_lives(plan, recompute, context)
    return [
        _saved_bytes(context, dtype, recompute)
        for dtype in (torch.float32, torch.bfloat16)
        for recompute in CHOICES
    ]


def test_lives_and_saved_bytes_on_two_tensor_ranks() -> None:
    for sizes in run_ranks(2, _on_rank):
        assert [predicted for predicted, _ in sizes] == [measured for _, measured in sizes]
        # Each choice makes more again than the one before.
        for kept in (sizes[:4], sizes[4:]):
            assert sorted(kept, reverse=True) == kept and len({*kept}) == 4


def _saved_bytes(
    context: ParallelContext, dtype: torch.dtype, recompute: str = "gathers"
) -> tuple[int, int]:
    """Predicted, and live between the forward and the backward of one micro-batch."""
    model = CausalLM(CONFIG, context, dtype)
    add_main_grads(model)
    lowered = lower(model, recompute=recompute)
    engine = engine_of(lowered)
    (piece,) = pieces(batch_of(CONFIG, 3, 32), 3, context)
    live: list[int] = []
    whole_pass = engine._walker._pass

    def watched(leg: Leg, state: StepState, on_gradient: Any) -> None:
        whole_pass(leg, state, on_gradient)
        live.append(engine.lanes.ledger.bytes)

    engine._walker._pass = watched  # type: ignore[method-assign]
    engine.train([piece])
    after_forward, after_backward = live
    assert after_backward == 0
    return sum(pair.saved_bytes(piece.tokens) for pair in lowered.layers), after_forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_predicted_saved_bytes_are_those_measured(dtype: torch.dtype) -> None:
    predicted, measured = _saved_bytes(ParallelContext.single(CPU), dtype)
    assert predicted == measured


def test_two_strands_hold_hardly_more_than_one() -> None:
    context = ParallelContext.single(CPU)
    config = replace(CONFIG, num_layers=8)
    model = CausalLM(config, context)
    add_main_grads(model)
    lowered = lower(model)
    peaks = {}
    for micro_batches in (1, 4):
        engine = engine_of(lowered)
        train(engine, model, pieces(batch_of(config, micro_batches, 32), 1, context))
        peaks[micro_batches] = engine.lanes.ledger.peak_bytes
    # One frees what the other fills: at most one layer of each is open beyond that.
    assert peaks[1] < peaks[4] < 1.35 * peaks[1]


def test_evaluation_and_prediction_save_nothing() -> None:
    context = ParallelContext.single(CPU)
    model = CausalLM(CONFIG, context)
    lowered = lower(model)
    first, *between, last = lowered.layers
    peaks = []
    for times in (1, 4):
        layers = (first, *between * times, last)
        engine = engine_of(replace(lowered, layers=layers, stage=Stage.alone(len(layers))))
        engine.evaluate(pieces(batch_of(CONFIG, 2, 8), 1, context))
        engine.predict(pieces(batch_of(CONFIG, 2, 8), 1, context))
        assert engine.lanes.ledger.slots == 0
        peaks.append(engine.lanes.ledger.peak_bytes)
    assert peaks[0] == peaks[1]


def test_the_ledger_counts_shared_storage_once() -> None:
    ledger, x = Ledger(), torch.zeros(4, 3)
    mark = Mark(Track(Lane.COMPUTE), 0, None, None)
    slots = [Slot(x, mark), Slot((x[1:], torch.zeros(2), torch.tensor(1.0)), mark), Slot(7, mark)]
    for slot in slots:
        ledger.add(slot)
    assert (ledger.slots, ledger.bytes, ledger.shared(x[2])) == (3, 56, True)
    ledger.remove(slots[0])
    assert (ledger.slots, ledger.bytes, ledger.shared(x)) == (2, 56, True)
    ledger.remove(slots[1])
    assert (ledger.slots, ledger.bytes, ledger.shared(x)) == (1, 0, False)
    assert (ledger.peak_slots, ledger.peak_bytes) == (3, 56)


def test_a_view_is_in_use_as_long_as_what_it_is_a_view_of() -> None:
    ledger, x, y = Ledger(), torch.zeros(4), torch.zeros(3)
    received = Slot(x, Mark(Track(Lane.PP, "0-1"), 0, None, None))
    kept = Slot((x.detach(), y), Mark(Track(Lane.COMPUTE), 0, None, None))
    fresh = Slot(torch.zeros(2), kept.mark)
    for slot in (received, kept, fresh):
        ledger.add(slot)
    assert received.memories == (received.memory,) and fresh.memories == (fresh.memory,)
    assert [memory.owner.lane for memory in kept.memories] == [Lane.COMPUTE, Lane.PP]
    assert kept.memories[1] is received.memory


def test_poison_reaches_memory_that_is_read_too_late() -> None:
    lanes = CpuLanes(poison=True)
    mark = Mark(Track(Lane.COMPUTE), 0, None, None)
    freed, shared, index = torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.long)
    first, second = Slot((freed, shared, index), mark), Slot(shared[:1], mark)
    for slot in (first, second):
        lanes.born(slot)
    lanes.release(first)
    assert first.value is None
    assert freed.isnan().all() and shared.eq(1).all() and index.eq(1).all()
    lanes.release(second)
    assert shared[0].isnan()
