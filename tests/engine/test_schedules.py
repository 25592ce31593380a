"""Schedules change no bit: what one stage computes by halves, and in any order of its works."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import SCHEDULES, Placement, Schedule, verify
from lightning_dhellam.pipeline.schedules.named import Written
from lightning_dhellam.plan import Strand, passes
from lightning_dhellam.plan.passes import CHOICES
from tests.engine.harness import CPU, add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.dense import DENSE
from tests.models.llama import SMALL
from tests.models.mixtures import MIXTURES
from tests.pipeline.random_schedules import random_schedule
from tests.plan.graphs import random_builder

DROPPING = replace(SMALL, num_layers=3, hidden_dropout=0.1)
CONFIGS = {
    "llama": DROPPING,
    "gpt2": DENSE["gpt2"],
    "mixtral": MIXTURES["mixtral"],
    "qwen3-moe": MIXTURES["qwen3-moe"],
}


def _model(config: ModelConfig) -> CausalLM:
    model = CausalLM(config, ParallelContext.single(CPU))
    add_main_grads(model)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_halves_compute_what_the_whole_does(name: str) -> None:
    model = _model(CONFIGS[name])
    micro_batches = pieces(batch_of(CONFIGS[name], 3, 8), 1, model.context)
    expected = train(engine_of(lower(model)), model, micro_batches)
    for choice in CHOICES:
        lowered = lower(model, recompute=choice, scheme=SCHEDULES["zb-v"])
        for seed, poison in ((1, False), (2, True)):
            engine = engine_of(lowered, builder=random_builder(seed), poison=poison)
            assert differing(train(engine, model, micro_batches), expected) == [], (choice, seed)
            assert {plan.backward.split(".")[1] for plan in engine.plans() if plan.backward} == {
                "input",
                "weights",
            }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_half_is_what_the_gradient_of_the_input_needs(name: str) -> None:
    for choice in CHOICES:
        for pair in lower(_model(CONFIGS[name]), recompute=choice).layers:
            whole = pair.backward
            first, second = passes.halves(whole)
            operators = {*first.operators, *second.operators}
            assert operators == {*whole.operators}
            assert len(first.operators) + len(second.operators) == len(operators)
            assert first.readers + second.readers == whole.readers
            assert (first.inputs, first.outputs) == (whole.inputs, whole.outputs)
            assert not second.is_link and not second.written & {*first.foreign}
            assert first.direction is second.direction is Strand.BACKWARD
            needed = {*whole.outputs}
            for operator in reversed(first.operators):
                assert needed & {*operator.writes}, f"{operator} can wait"
                needed.update(operator.reads)


def test_no_schedule_changes_a_bit() -> None:
    model = _model(replace(DROPPING, hidden_dropout=0.2))
    micro_batches = pieces(batch_of(DROPPING, 7, 8), 2, model.context)
    expected = train(engine_of(lower(model)), model, micro_batches)
    placement = Placement.folded(1)
    for seed in range(16):
        schedule = random_schedule(seed, placement, len(micro_batches))
        lowered = lower(model, scheme=Written(schedule, "random"))
        engine = engine_of(lowered, builder=random_builder(seed), poison=seed % 2 == 0)
        assert differing(train(engine, model, micro_batches), expected) == [], str(schedule)
        assert engine.evaluate(micro_batches).isfinite()


def test_gradients_are_ready_with_their_last_work() -> None:
    """A parameter is announced once for the last micro-batch, after all that adds to it."""
    model = _model(DROPPING)
    micro_batches = pieces(batch_of(DROPPING, 4, 8), 1, model.context)
    for name in ("fold", "zb-v", "dualpipe-v"):
        engine = engine_of(lower(model, scheme=SCHEDULES[name]))
        ready: dict[int, object] = {}

        def note(parameters: tuple[object, ...], ready: dict[int, object] = ready) -> None:
            for parameter in parameters:
                assert id(parameter) not in ready
                ready[id(parameter)] = parameter.main_grad.clone()  # type: ignore[attr-defined]

        for parameter in model.parameters():
            parameter.main_grad.zero_()
        engine.train(micro_batches, note)
        assert ready.keys() == {id(parameter) for parameter in model.parameters()}
        for parameter in model.parameters():
            assert (ready[id(parameter)] == parameter.main_grad).all()


def test_random_schedules_are_valid_and_unlike() -> None:
    found: set[Schedule] = set()
    for stages in (1, 2, 3):
        for seed in range(20):
            schedule = random_schedule(seed, Placement.folded(stages), 5)
            verify(schedule)
            assert Schedule.parse(str(schedule)) == schedule
            found.add(schedule)
    assert len(found) == 60
