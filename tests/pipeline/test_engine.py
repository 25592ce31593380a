"""Stages together compute what one stage does: every loss, every gradient, every logit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine import Engine
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig, export_llama, import_llama
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.pipeline.schedules import (
    SCHEDULES,
    Placement,
    live_activations,
    peak_activations,
    placement_of,
)
from lightning_dhellam.pipeline.schedules.named import Written
from lightning_dhellam.pipeline.stage import Leg
from lightning_dhellam.plan import BUILDERS, Lane
from lightning_dhellam.plan.passes import CHOICES
from tests.engine.harness import (
    CPU,
    LoadingLanes,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    prepared,
    reduced,
    train,
)
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.pipeline.random_schedules import random_schedule
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

LENGTH = 8
CONFIG = replace(SMALL, num_layers=7, hidden_dropout=0.1)


class Case(NamedTuple):
    """A model and how its layers are split."""

    config: ModelConfig
    split: tuple[int, ...] = ()


CASES: dict[int, dict[str, Case]] = {
    2: {
        "uneven": Case(CONFIG),
        "tied": Case(replace(CONFIG, tie_embeddings=True)),
        "given-split": Case(CONFIG, (3, 1, 2, 1)),
        "only-embedding-and-head-on-the-first": Case(CONFIG, (0, 3, 4, 0)),
    },
    4: {
        "uneven": Case(CONFIG),
        "tied": Case(replace(CONFIG, num_layers=8, tie_embeddings=True)),
        "given-split": Case(CONFIG, (0, 1, 1, 1, 1, 1, 1, 1)),
    },
}


def _context(
    stages: int,
    case: Case = CASES[2]["uneven"],
    placement: Placement | None = None,
    **sizes: int,
) -> ParallelContext:
    return ParallelContext.create(
        CPU,
        pipeline_parallel_size=stages,
        pipeline_split=_split(case, placement.chunks) if placement else case.split,
        placement=placement,
        tied=case.config.tie_embeddings,
        **sizes,
    )


def _split(case: Case, chunks: int) -> tuple[int, ...]:
    """That of a case, where neighbouring chunks of it are one if there are fewer."""
    each = len(case.split) // chunks
    return tuple(sum(case.split[i * each :][:each]) for i in range(chunks) if each)


def _model(config: ModelConfig, context: ParallelContext) -> CausalLM:
    model = CausalLM(config, context)
    add_main_grads(model)
    return model


def _placed(stages: int) -> dict[Placement, list[str]]:
    """The schedules with a name, by where their chunks lie."""
    found: dict[Placement, list[str]] = {}
    for name in SCHEDULES:
        found.setdefault(placement_of(name, stages), []).append(name)
    return found


def _counts(stages: int, name: str, schedule: str = "fold") -> Sequence[int]:
    """Every number of micro-batches for one case; for the others one that is less than P."""
    if name == "uneven":
        return range(1, 2 * stages + 4) if schedule == "fold" else (1, stages + 1, 2 * stages + 3)
    return range(stages - 1, stages + 1) if schedule == "fold" else (stages - 1,)


Outcome = dict[str, Tensor]


def _outcomes(rank: int, stages: int, of: int) -> dict[tuple[str, int, str], Outcome]:
    """What one rank of `stages` computes in the cases of a pipeline of `of` stages.

    By case, number of micro-batches, and schedule.
    """
    found = {}
    placed = _placed(stages) if stages == of else {Placement.folded(1): ["fold"]}
    for (name, case), placement in product(CASES[of].items(), placed):
        context = _context(stages, case if stages == of else Case(case.config), placement)
        model = _model(case.config, context)
        weights = {f"{n}.initial": p.detach() for n, p in model.named_parameters()}
        counts = {one: _counts(of, name, one) for one in placed[placement]}
        for schedule, count in ((one, n) for one in counts for n in counts[one]):
            if count == _counts(of, name, schedule)[0]:
                lowered = lower(model, scheme=SCHEDULES[schedule])
                engine = engine_of(lowered, lanes=LoadingLanes(poison=True))
            # The last micro-batch is smaller than the others.
            batch = batch_of(case.config, 2 * count - (count > 1), LENGTH)
            micro_batches = pieces(batch, 2, context)
            loss, gradients = train(engine, model, micro_batches)
            results = {"train": loss, "evaluate": engine.evaluate(micro_batches)}
            results["predict"] = engine.predict(micro_batches)
            assert engine.lanes.ledger.slots == 0
            if not context.has_loss:
                assert not any(result.any() for result in results.values())
                results = {}
            found[name, count, schedule] = {**results, **gradients, **weights}
        context.destroy()
    return found


def _same(name: str, case: Case, actual: Tensor, expected: Tensor) -> bool:
    # The two gradients of a tied weight are added up in another order.
    if case.config.tie_embeddings and name == "embedding.word_embeddings.weight":
        return relative_error(actual, expected) <= 1e-6
    return torch.equal(actual, expected)


@pytest.mark.parametrize("stages", CASES)
def test_losses_gradients_and_logits_are_those_of_one_stage(stages: int) -> None:
    (whole,) = run_ranks(1, _outcomes, 1, stages)
    ranks = run_ranks(stages, _outcomes, stages, stages)
    assert {schedule for _, _, schedule in ranks[0]} == {*SCHEDULES}
    for name, count, schedule in ranks[0]:
        case, expected = CASES[stages][name], whole[name, count, "fold"]
        parts = [rank[name, count, schedule] for rank in ranks]
        computed = sorted(key for part in parts for key in part)
        assert computed == sorted(expected), f"{name}: a layer is lost or doubled"
        wrong = [
            key
            for part in parts
            for key, actual in part.items()
            if not _same(key, case, actual, expected[key])
        ]
        assert not wrong, f"{name}, {count} micro-batches by {schedule}: {wrong}"


ENDS = ("fold", "interleaved-1f1b")
"""Schedules whose stages have both ends of the model together, and apart."""


def _against_hugging_face(
    rank: int, sizes: dict[str, int]
) -> list[tuple[bool, Tensor, dict[str, Tensor]]]:
    case = Case(replace(SMALL, num_layers=5, tie_embeddings=True, vocab_size=53))
    found = []
    for schedule in ENDS:
        context = _context(2, case, placement_of(schedule, 2), **sizes)
        model = prepared(case.config, context)
        engine = engine_of(lower(model, scheme=SCHEDULES[schedule]), poison=True)
        loss, gradients = train(engine, model, pieces(batch_of(case.config, 5, LENGTH), 2, context))
        exported = export_llama(model, reduced(model, gradients))
        found.append((context.has_loss, loss, exported))
        context.destroy()
    return found


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_gradients_are_hugging_faces(tensor_parallel_size: int) -> None:
    config = replace(SMALL, num_layers=5, tie_embeddings=True, vocab_size=53)
    reference, batch = hugging_face_llama(config), batch_of(config, 5, LENGTH)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    expected_loss = losses.sum() / (batch["labels"] != -100).sum()
    expected_loss.backward()
    sizes = {"tensor_parallel_size": tensor_parallel_size}
    outcomes = run_ranks(2 * tensor_parallel_size, _against_hugging_face, sizes)
    for has_loss, loss, gradients in chain.from_iterable(outcomes):
        assert abs(loss - expected_loss * has_loss) <= 1e-6 * expected_loss
        errors = {
            name: relative_error(gradients[name], parameter.grad)
            for name, parameter in reference.named_parameters()
            if parameter.grad is not None
        }
        assert errors.keys() == gradients.keys()
        assert max(errors.values()) <= 1e-5, errors


def _on_data_parallel_stages(rank: int) -> list[tuple[int, dict[str, Tensor]]]:
    """The gradients of this stage's layers as the optimizer gets them, with two replicas."""
    return [_of_replica(schedule) for schedule in ENDS]


def _of_replica(schedule: str) -> tuple[int, dict[str, Tensor]]:
    config = replace(SMALL, num_layers=5, tie_embeddings=True)
    context = _context(2, Case(config), placement_of(schedule, 2))
    assert context.topology.dp_size == 2
    model = CausalLM(config, context)
    import_llama(model, hugging_face_llama(config))
    engine = engine_of(lower(model, scheme=SCHEDULES[schedule]), poison=True)
    buffers = GradientBuffers(model, model.transformer_config, context, sharded=False, fp32=True)
    everyone = Everyone(context.groups.dp_cp, engine.lanes) if context.has_loss else None
    batch = {
        name: rows[context.topology.dp_rank :: 2]
        for name, rows in batch_of(config, 6, LENGTH).items()
    }
    for _ in range(2):  # what the first step leaves must not be in the second
        buffers.zero()
        engine.train(
            pieces(batch, 2, context, everyone=everyone),
            lambda parameters: buffers.ready(parameters, lambda: engine.lanes.on(Lane.DP)),
        )
        buffers.finish()
    gradients = {name: p.main_grad.clone() for name, p in model.named_parameters()}
    context.destroy()
    return context.topology.dp_rank, export_llama(model, gradients)


def test_gradients_of_replicated_stages_are_hugging_faces() -> None:
    config = replace(SMALL, num_layers=5, tie_embeddings=True)
    reference, batch = hugging_face_llama(config), batch_of(config, 6, LENGTH)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    (losses.sum() / (batch["labels"] != -100).sum()).backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    found: dict[tuple[str, int], dict[str, Tensor]] = {}
    for outcomes in run_ranks(4, _on_data_parallel_stages):
        for schedule, (replica, gradients) in zip(ENDS, outcomes, strict=True):
            found.setdefault((schedule, replica), {}).update(gradients)
    assert len(found) == 4
    for gradients in found.values():
        assert gradients.keys() == expected.keys()
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-5, errors


def _watched(engine: Engine, after: Callable[[Leg, Any], None]) -> None:
    whole_pass = engine._walker._pass

    def watched(leg: Leg, state: Any, on_gradient: Any) -> None:
        whole_pass(leg, state, on_gradient)
        after(leg, state)

    engine._walker._pass = watched  # type: ignore[method-assign]


def _on_two_stages(rank: int) -> dict[str, Any]:
    context = _context(2)
    config = replace(CONFIG, num_layers=8)
    model = _model(config, context)
    names = list(CHOICES)
    lowered = lower(model, recompute={i: names[i % len(names)] for i in range(8)})
    micro_batches = pieces(batch_of(config, 5, LENGTH), 1, context)
    engine = engine_of(lowered, builder=BUILDERS["sequential"])
    expected = train(engine, model, micro_batches)
    wrong = {}
    builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(20)}
    for index, (name, builder) in enumerate(builders.items()):
        other = engine_of(lowered, builder=builder, poison=index % 2 == 0)
        wrong[name] = differing(train(other, model, micro_batches), expected)
    for seed in range(5):
        schedule = random_schedule(seed, Placement.folded(2), len(micro_batches))
        drawn = lower(model, scheme=Written(schedule, "random"))
        other = engine_of(drawn, builder=random_builder(seed), lanes=LoadingLanes(poison=True))
        wrong[str(schedule)] = differing(train(other, model, micro_batches), expected)
    trace = _trace(engine, context)
    context.destroy()
    loss, gradients = expected
    of_stages = of_all_ranks(gradients, dist.group.WORLD)
    every = {"loss": loss} | {name: g for part in of_stages for name, g in part.items()}
    wrong |= _on_other_placements(config, of_all_ranks(every, dist.group.WORLD)[0])
    return {"wrong": {n: w for n, w in wrong.items() if w}, "trace": trace}


def _on_other_placements(config: ModelConfig, expected: dict[str, Tensor]) -> dict[str, list[str]]:
    """What differs where chunks go round, or lie as nobody would think of, by random schedules."""
    wrong = {}
    for seed, stage_of in enumerate([(0, 1), (0, 1, 0, 1), (1, 0, 0, 1, 0, 1)]):
        placement = Placement(stage_of)
        context = _context(2, placement=placement)
        model = _model(config, context)
        micro_batches = pieces(batch_of(config, 5, LENGTH), 1, context)
        scheme = Written(random_schedule(seed, placement, len(micro_batches)), "random")
        engine = engine_of(
            lower(model, scheme=scheme), builder=random_builder(seed), lanes=LoadingLanes()
        )
        loss, found = train(engine, model, micro_batches)
        found |= {"loss": loss} if context.has_loss else {}
        wrong[str(scheme.schedule)] = [
            name for name, value in found.items() if not torch.equal(value, expected[name])
        ]
        context.destroy()
    return wrong


Interval = tuple[str, float, float]


def _trace(engine: Engine, context: ParallelContext) -> list[Interval]:
    """Transfers from their start until they are known to be over, and compute operators."""
    micro_batches = pieces(batch_of(CONFIG, 6, LENGTH), 1, context)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train(micro_batches)
    labels = ("forward/", "backward/", "gloo:")
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.name.startswith(labels) and not event.name.endswith((".send", ".receive"))
    ]


@pytest.fixture(scope="module")
def two_stages() -> list[dict[str, Any]]:
    return run_ranks(2, _on_two_stages)


def test_no_plan_and_no_schedule_changes_a_bit(two_stages: list[dict[str, Any]]) -> None:
    assert [outcome["wrong"] for outcome in two_stages] == [{}, {}]


def test_transfers_overlap_the_operators_of_passes(two_stages: list[dict[str, Any]]) -> None:
    for stage, outcome in enumerate(two_stages):
        operators = [(a, b) for name, a, b in outcome["trace"] if not name.startswith("gloo:")]
        hidden: dict[str, list[int]] = {"gloo:send": [], "gloo:recv": []}
        for name, start, end in outcome["trace"]:
            if name in hidden:
                inside = sum(start <= a and b <= end for a, b in operators)
                hidden[name].append(inside)
        # Six micro-batches cross this edge twice in each direction, once on each strand.
        assert len(hidden["gloo:recv"]) == len(hidden["gloo:send"]) == 12
        # What the first visit receives can only be waited for; what the last sends, as well.
        first = 1 if stage else 0
        assert sum(count == 0 for count in hidden["gloo:recv"]) == first, hidden
        assert sum(count == 0 for count in hidden["gloo:send"]) <= 1, hidden
        assert sum(hidden["gloo:recv"]) > 100


def _held(rank: int, stages: int, count: int) -> dict[str, Any]:
    """Chunks that are held after each leg: counted, and predicted in bytes and measured."""
    context = _context(stages)
    config = replace(CONFIG, num_layers=2 * stages, vocab_size=8)
    model = _model(config, context)
    lowered = lower(model)
    engine = engine_of(lowered)
    micro_batches = pieces(batch_of(config, count, 16), 1, context)
    stage, tokens = lowered.stage, micro_batches[0].tokens
    saved = [pair.saved_bytes(tokens) for pair in lowered.layers]
    halves = tuple(stage.chunks.values())
    chunk_bytes = tuple(sum(saved[i] for i in layers) for layers in halves)
    boundary = tokens * config.hidden_size * 4
    legs = stage.step(count).legs
    held: list[int] = []
    bytes_of: list[tuple[int, int]] = []

    def after(leg: Leg, state: Any) -> None:
        following = legs[legs.index(leg) + 1 :][:1]
        posted = sum(
            _receives(engine, strand, layer) for f in following for strand, layer in f.begins
        )
        kept = [0, 0]
        for micro_batch in state._under_way.values():
            tapes = micro_batch.tapes
            for half, layers in enumerate(halves):
                open_tapes = [tapes[i] for i in layers if i in tapes]
                # A tape that is there for a posted receive alone holds one slot.
                kept[half] += any(len(tape.names()) > 1 for tape in open_tapes)
        held.append(sum(kept))
        expected = kept[0] * chunk_bytes[0] + kept[1] * chunk_bytes[1] + posted * boundary
        bytes_of.append((expected, engine.lanes.ledger.bytes))

    _watched(engine, after)
    train(engine, model, micro_batches)
    visits = SCHEDULES["fold"](stages, count).visits[rank]
    live = live_activations(visits)
    predicted = live[1::2] if rank == stages - 1 else live
    context.destroy()
    return {
        "held": held,
        "predicted": predicted,
        "bytes": bytes_of,
        "peak": peak_activations(visits),
        "peak_bytes": engine.lanes.ledger.peak_bytes,
        "chunk_bytes": chunk_bytes,
    }


def _receives(engine: Engine, strand: str, layer: int) -> int:
    pair = engine.layers[layer]
    graph = pair.forward if strand == "forward" else pair.backward
    return len(graph.receives)


def _all_held(rank: int) -> list[dict[str, Any]]:
    return [_held(rank, 4, count) for count in (8, 9, 2)]


def test_what_is_held_is_what_the_schedule_predicts_and_is_balanced() -> None:
    outcomes = run_ranks(4, _all_held)
    for runs in outcomes:
        for run in runs:
            assert run["held"] == run["predicted"]
            assert all(expected == measured for expected, measured in run["bytes"])
            # In a visit the forward fills what the backward frees.
            assert run["peak_bytes"] < run["peak"] * max(run["chunk_bytes"]) * 1.3
    for index in (0, 1):
        assert [runs[index]["peak"] for runs in outcomes] == [9] * 4
        assert [max(runs[index]["held"]) for runs in outcomes] == [8] * 4
