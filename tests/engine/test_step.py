"""The step around the graphs: cutting, visits, notifications, traces, errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine import Engine, cut, make_lanes
from lightning_dhellam.engine.executor import Executor, Job, bind, receives
from lightning_dhellam.engine.inputs import Limits, check_batch
from lightning_dhellam.engine.tape import Tape
from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import BUILDERS, Graph, GraphPair, Lane, Operator, PlanError, Strand
from tests.engine.harness import CPU, add_main_grads, batch_of, engine_of, pieces, prepared, train
from tests.models.llama import SMALL, relative_error


@pytest.fixture
def context() -> ParallelContext:
    return ParallelContext.single(CPU)


@pytest.fixture
def model(context: ParallelContext) -> CausalLM:
    return prepared(SMALL, context)


def test_evaluation_is_the_loss_of_training_and_prediction_the_models_output(
    model: CausalLM, context: ParallelContext
) -> None:
    batch = batch_of(SMALL, 5)
    micro_batches = pieces(batch, 2, context)
    engine = engine_of(lower(model))
    loss, _ = train(engine, model, micro_batches)
    assert torch.equal(engine.evaluate(micro_batches), loss)
    with torch.no_grad():
        expected = model(batch["tokens"])
    predicted = engine.predict(micro_batches)
    assert not predicted.requires_grad and predicted.shape == expected.shape
    assert relative_error(predicted, expected) <= 1e-6
    unlabelled = pieces({"tokens": batch["tokens"]}, 2, context)
    assert torch.equal(engine.predict(unlabelled), predicted)


def test_gradients_are_added_to_what_is_there(model: CausalLM, context: ParallelContext) -> None:
    micro_batches = pieces(batch_of(SMALL), 2, context)
    engine = engine_of(lower(model))
    _, once = train(engine, model, micro_batches)
    engine.train(micro_batches)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.main_grad, 2 * once[name]) <= 1e-6, name
        assert parameter.grad is None


def test_weights_are_read_anew_in_every_step(model: CausalLM, context: ParallelContext) -> None:
    micro_batches = pieces(batch_of(SMALL), 2, context)
    engine = engine_of(lower(model))
    before = engine.evaluate(micro_batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    fresh = engine_of(lower(model)).evaluate(micro_batches)
    assert not torch.equal(before, fresh)
    assert torch.equal(engine.evaluate(micro_batches), fresh)


def test_other_lengths_and_counts_follow_each_other(
    model: CausalLM, context: ParallelContext
) -> None:
    engine = engine_of(lower(model))
    for samples, length, size in ((1, 64, 1), (3, 8, 2), (4, 16, 4)):
        micro_batches = pieces(batch_of(SMALL, samples, length), size, context)
        loss, _ = train(engine, model, micro_batches)
        fresh, _ = train(engine_of(lower(model)), model, micro_batches)
        assert torch.equal(loss, fresh)


def test_gradients_are_announced_in_the_last_micro_batch_when_they_are_complete(
    context: ParallelContext,
) -> None:
    model = prepared(replace(SMALL, tie_embeddings=True), context)
    engine = engine_of(lower(model))
    micro_batches = pieces(batch_of(SMALL), 1, context)
    _, final = train(engine, model, micro_batches)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    announced: dict[str, Tensor] = {}
    for parameter in model.parameters():
        parameter.main_grad.zero_()

    def on_gradient(parameters: tuple[Any, ...]) -> None:
        for parameter in parameters:
            # The last announcement of a tied weight is the one that counts.
            announced[names[id(parameter)]] = parameter.main_grad.clone()

    engine.train(micro_batches, on_gradient)
    assert announced.keys() == final.keys()
    assert all(torch.equal(announced[name], final[name]) for name in final)


def test_a_profile_shows_operators_by_strand_and_name(
    model: CausalLM, context: ParallelContext
) -> None:
    lowered = lower(model)
    engine = engine_of(lowered)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        engine.train(pieces(batch_of(SMALL, 3, 8), 1, context))
    counts = {event.key: event.count for event in profile.key_averages()}
    for pair in lowered.layers:
        layers = SMALL.num_layers if pair.name == "transformer" else 1
        for graph in (pair.forward, pair.backward):
            for operator in graph.operators:
                label = f"{graph.direction}/{operator.name}"
                assert counts.get(label) == 3 * layers, label


def _broken(lowered: Lowered, name: str) -> Lowered:
    """The same graphs, one operator of the transformer layers failing."""

    def fail(*values: Any) -> None:
        raise RuntimeError("the device caught fire")

    def broken(pair: GraphPair) -> GraphPair:
        graphs = []
        for graph in (pair.forward, pair.backward):
            operators = tuple(
                replace(o, run=fail) if o.name == name else o for o in graph.operators
            )
            graphs.append(replace(graph, operators=operators))
        return GraphPair(*graphs)

    return replace(lowered, layers=tuple(map(broken, lowered.layers)))


@pytest.mark.parametrize("name", ["forward/fc1.gemm", "backward/qkv.wgrad"])
def test_an_error_in_an_operator_names_it(
    name: str, model: CausalLM, context: ParallelContext
) -> None:
    engine = engine_of(_broken(lower(model), name.split("/")[1]))
    with pytest.raises(RuntimeError, match="the device caught fire") as error:
        engine.train(pieces(batch_of(SMALL), 2, context))
    told = [str(error.value), *getattr(error.value, "__notes__", [])]
    assert any(name in line for line in told), told


def test_plans_lists_every_distinct_plan_in_walking_order(model: CausalLM) -> None:
    engine = engine_of(lower(model))
    pairs = [(plan.forward, plan.backward) for plan in engine.plans()]
    assert pairs == [
        ("embedding", None),
        ("transformer", None),
        ("head", None),
        (None, "head"),
        (None, "transformer"),
        (None, "embedding"),
        ("embedding", "head"),
        ("transformer", "transformer"),
        ("head", "embedding"),
    ]
    engine.install(BUILDERS["dhellam"])
    assert {plan.name for plan in engine.plans()} == {"dhellam"}


def test_a_plan_of_other_graphs_is_refused_before_anything_runs(
    model: CausalLM, context: ParallelContext
) -> None:
    engine = engine_of(lower(model))
    build = BUILDERS["interleaved"]
    engine.install(lambda forward, backward: build(forward, None))
    with pytest.raises(PlanError, match="made for backward graph 'None', used with 'head'"):
        engine.plans()
    pair = engine.layers[1]
    plan = build(pair.forward, None)
    with pytest.raises(PlanError, match="is never issued"):
        bind(replace(plan, rows=plan.rows[:-1]), pair.forward, None)


RANK_3 = Topology(world_size=4, rank=3)


def test_cut_keeps_every_row_once_and_weights_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(SMALL, 5, 8) | {
        "loss_mask": torch.rand(5, 8, generator=generator),
        "name": "not a tensor",
        "scalar": torch.tensor(3.0),
        "ids": torch.arange(5),
    }
    micro_batches = cut(batch, 2, device=CPU, seed=1, step=2, topology=RANK_3)
    assert [piece.tokens for piece in micro_batches] == [16, 16, 8]
    slots = [piece.slots for piece in micro_batches]
    assert torch.equal(torch.cat([s["batch.tokens"] for s in slots]), batch["tokens"])
    labels = torch.cat([s["batch.labels"] for s in slots], dim=1)
    counted = batch["labels"].t() >= 0
    assert torch.equal(labels[counted], batch["labels"].t()[counted]) and labels.min() >= 0
    weights = torch.cat([s["batch.weights"] for s in slots], dim=1)
    assert torch.all(weights[~counted] == 0)
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-6)
    ratio = weights[counted] / batch["loss_mask"].t()[counted]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert [s["batch.share"] for s in slots] == [0.4, 0.4, 0.2]
    data = [s["batch.data"] for s in slots]
    assert [d["ids"].tolist() for d in data] == [[0, 1], [2, 3], [4]]
    assert all(d["name"] == "not a tensor" and d["scalar"] == 3 for d in data)


def test_ranks_that_share_sequences_take_their_pieces_of_all_that_is_cut() -> None:
    batch = batch_of(SMALL, 3, 16) | {"deep": torch.rand(3, 16, 2), "other": torch.rand(3, 5)}
    batch["position_ids"] = torch.arange(16)  # says what is so without it
    batch["loss_mask"] = torch.rand(3, 16)
    own = {0: [0, 1, 2, 3, 12, 13, 14, 15], 1: [4, 5, 6, 7, 8, 9, 10, 11]}
    for rank in range(4):
        topology = Topology(world_size=4, rank=rank, tp_size=2, cp_size=2)
        first, last = cut(batch, 2, device=CPU, seed=1, step=2, topology=topology)
        places = own[topology.cp_rank]
        assert (first.tokens, last.tokens) == (16, 8)
        for piece, rows in ((first, slice(0, 2)), (last, slice(2, 3))):
            slots, data = piece.slots, piece.slots["batch.data"]
            assert torch.equal(slots["batch.tokens"], batch["tokens"][rows, places])
            assert slots["batch.positions"].tolist() == [[p] * len(data["tokens"]) for p in places]
            assert slots["batch.places"].tolist() == places[4 * (rank % 2) :][:4]
            assert slots["batch.every_place"].tolist() == places
            assert data["position_ids"].tolist() == [places] * len(data["tokens"])
            for name in ("labels", "loss_mask", "deep"):
                assert torch.equal(data[name], batch[name][rows][:, places]), name
            assert torch.equal(data["other"], batch["other"][rows])
        labels = batch["labels"][:2, places].clamp_min(0).t()
        assert torch.equal(first.slots["batch.labels"], labels)


def test_labels_that_are_not_read_may_be_anything() -> None:
    limits = Limits(SMALL.vocab_size, SMALL.max_sequence_length, tensor_parallel_size=1)
    tokens = batch_of(SMALL, 5, 8)["tokens"]
    for labels in (torch.ones(5), "text", None):
        batch = {"tokens": tokens, "labels": labels}
        first, *_ = cut(batch, 2, device=CPU, seed=1, step=2, topology=RANK_3, targets=False)
        assert "batch.labels" not in first.slots
        check_batch(batch, limits, needs_labels=False)
    assert "batch.labels" not in cut(batch, 2, device=CPU, seed=1, step=2, topology=RANK_3)[0].slots
    with pytest.raises(ValueError, match=r"without \['labels'\]"):
        check_batch(batch, limits, needs_labels=True)


def test_every_micro_batch_step_rank_and_seed_has_its_own_key() -> None:
    batch = batch_of(SMALL, 3, 8)
    keys = {
        piece.slots["batch.key"]
        for seed in (1, 2)
        for step in (0, 1)
        for rank in (0, 1)
        for piece in cut(batch, 1, device=CPU, seed=seed, step=step, topology=Topology(2, rank))
    }
    assert len(keys) == 2 * 2 * 2 * 3


def test_ranks_that_share_samples_have_one_key_for_what_they_compute_alike() -> None:
    def keys(slot: str, tp_size: int, ranks: int) -> list[int]:
        topologies = [Topology(world_size=ranks, rank=r, tp_size=tp_size) for r in range(ranks)]
        pieces = (cut(batch, 2, device=CPU, seed=1, step=0, topology=t)[0] for t in topologies)
        return [piece.slots[slot] for piece in pieces]

    batch = batch_of(SMALL, 2, 8)
    alone = keys("batch.whole_key", 1, 2)
    assert alone == keys("batch.key", 1, 2) and alone[0] != alone[1]
    assert keys("batch.whole_key", 2, 4) == [alone[0], alone[0], alone[1], alone[1]]
    assert len(set(keys("batch.key", 2, 4))) == 4


def test_prediction_without_its_graph_is_our_mistake(
    model: CausalLM, context: ParallelContext
) -> None:
    engine = Engine(lower(model).layers, make_lanes(CPU), BUILDERS["sequential"])
    with pytest.raises(AssertionError, match="without a graph for logits"):
        engine.predict(pieces(batch_of(SMALL), 2, context))


def test_the_callers_batch_is_left_as_it_was(context: ParallelContext) -> None:
    model = CausalLM(SMALL, context, torch.bfloat16)
    add_main_grads(model)
    batch = batch_of(SMALL)
    copies = {name: value.clone() for name, value in batch.items()}
    train(engine_of(lower(model), poison=True), model, pieces(batch, 2, context))
    assert all(torch.equal(batch[name], copies[name]) for name in batch)


class Arriving:
    """Work whose result is there once it is waited for."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def wait(self) -> None:
        self._value.fill_(1)

    def is_completed(self) -> bool:
        return False


def test_an_observer_is_shown_what_has_arrived() -> None:
    def receive(tokens: Tensor) -> Pending:
        value = torch.full((4,), torch.nan)
        return Pending(value, Arriving(value))

    arriving = Operator("x.receive", Lane.PP, ("batch.tokens",), ("x",), receive)
    doubling = Operator("double", Lane.COMPUTE, ("x",), ("y",), lambda x: 2 * x)
    graph = Graph("toy", Strand.FORWARD, (doubling,), ("x",), ("y",), receives=(arriving,))
    lanes = make_lanes(CPU)
    batch = Tape(Counter({"batch.tokens": 1}))
    batch.put("batch.tokens", lanes.constants({"batch.tokens": torch.zeros(1)})["batch.tokens"])
    tape = Tape(graph.readers, batch)
    shown: dict[str, Tensor] = {}
    executor = Executor(lanes)
    executor.observer = lambda entry, values: shown.update({entry.operator.name: values[0].clone()})
    executor.post(receives(graph), tape)
    program = bind(BUILDERS["sequential"](graph, None), graph, None)
    executor.run(Job(program, {Strand.FORWARD: tape}))
    assert shown["double"].eq(1).all() and tape["y"].value.eq(2).all()
