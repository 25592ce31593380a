"""Of a tied weight that is frozen no stage computes a gradient, sends one, or waits for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.memory.prediction import Run, predict
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.parallel.transport import Transport
from lightning_dhellam.pipeline.schedules import SCHEDULES, placement_of, scheme_of
from lightning_dhellam.runner import Runner
from tests.engine.harness import add_main_grads, batch_of
from tests.models.llama import SMALL, relative_error
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=6, hidden_dropout=0.1, tie_embeddings=True)
EMBEDDING = "embedding.word_embeddings.weight"
COUNT = 5
PIPELINES = {2: [*SCHEDULES], 3: ["1f1b"]}
"""Of three stages the edges between the first and the last carry the tied weight alone."""


class Counting:
    """Counts what an edge carries."""

    def __init__(self, carrier: Transport, sizes: list[int]) -> None:
        self._carrier = carrier
        self._sizes = sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._carrier, name)

    def exchange(self, sent: Sequence[Tensor], received: Sequence[Tensor], *ends: int) -> Any:
        self._sizes.append(sum(x.numel() for x in (*sent, *received)))
        return self._carrier.exchange(sent, received, *ends)


@contextmanager
def _runner(stages: int, schedule: str | None, frozen: bool) -> Iterator[tuple[Runner, Any]]:
    carried: dict[Any, list[int]] = {}

    def build(context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        for edge, carrier in context.edges.items():
            carried[edge] = []
            context.edges[edge] = Counting(carrier, carried[edge])  # type: ignore[index]
        model = CausalLM(CONFIG, context, dtype)
        if model.embedding is not None:
            model.embedding.word_embeddings.weight.requires_grad_(not frozen)
        add_main_grads(model)
        return model

    with Runner.create(
        build,
        "cpu",
        pipeline_parallel_size=stages,
        schedule=schedule,
        pipeline_split=None,
    ) as runner:
        yield runner, carried


def _outcomes(
    rank: int, stages: int, schedules: list[str | None], frozen: bool
) -> list[dict[str, Any]]:
    found = []
    for schedule in schedules:
        with _runner(stages, schedule, frozen) as (runner, carried):
            loss = runner.engine.train(runner.intake.micro_batches(_batch())).clone()
            trained = {n: p for n, p in runner.model.named_parameters() if p.requires_grad}
            grads = {n: p.main_grad.clone() for n, p in trained.items()}
            copy = runner.model.tied_copy
            found.append(
                {
                    "loss": loss,
                    "grads": grads,
                    "carried": {edge: Counter(sizes) for edge, sizes in carried.items()},
                    "copy": copy is not None and hasattr(copy, "main_grad"),
                }
            )
    return found


def _batch() -> dict[str, Tensor]:
    return batch_of(CONFIG, COUNT, 8)


@pytest.mark.parametrize("stages", PIPELINES)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_is_there_where_it_is_trained_and_nowhere_else(
    frozen: bool, stages: int
) -> None:
    names = PIPELINES[stages]
    ((whole,),) = run_ranks(1, _outcomes, 1, [None], frozen)
    assert (EMBEDDING in whole["grads"]) is not frozen
    ranks = run_ranks(stages, _outcomes, stages, names, frozen)
    weight = SMALL.vocab_size * SMALL.hidden_size
    for index, name in enumerate(names):
        parts = [rank[index] for rank in ranks]
        found = {n: grad for part in parts for n, grad in part["grads"].items()}
        assert found.keys() == whole["grads"].keys()
        for n, grad in found.items():
            if n == EMBEDDING:
                assert relative_error(grad, whole["grads"][n]) <= 1e-6
            else:
                assert torch.equal(grad, whole["grads"][n]), f"{name}: {n}"
        last = placement_of(name, stages).last
        assert torch.equal(parts[last]["loss"], whole["loss"])
        # No more goes over an edge than works send, the weight itself, and its gradient if any.
        sent, _ = scheme_of(name, stages)(stages, COUNT).messages()
        expected = {edge: len(works) for edge, works in sent.items()}
        loop = placement_of(name, stages).loop
        for edge in loop[: 1 if frozen else 2]:
            expected[edge] = expected.get(edge, 0) + 1
        for stage, part in enumerate(parts):
            own = {edge: sizes for edge, sizes in part["carried"].items() if stage in edge[:2]}
            assert {e: n.total() for e, n in own.items() if n} == {
                e: n for e, n in expected.items() if stage in e[:2]
            }, name
            assert sum(sizes[weight] for sizes in own.values()) == sum(
                stage in edge[:2] for edge in loop[: 1 if frozen else 2]
            )
        assert [part["copy"] for part in parts] == [
            bool(loop) and not frozen and stage == stages - 1 for stage in range(stages)
        ]


def _frozen_model(context: ParallelContext, dtype: torch.dtype) -> CausalLM:
    model = CausalLM(CONFIG, context, dtype)
    if model.embedding is not None:
        model.embedding.word_embeddings.weight.requires_grad_(False)
    return model


def test_a_frozen_copy_is_predicted_without_a_gradient() -> None:
    topology = Topology(world_size=2, pp_size=2)
    run = Run(CONFIG, topology, COUNT, 8, precision="32-true", schedule="1f1b")
    (_, trained), (_, frozen) = predict(run), predict(replace(run, build=_frozen_model))
    weight = 4 * SMALL.vocab_size * SMALL.hidden_size
    assert trained.gradients - frozen.gradients == weight
    assert trained.weights == frozen.weights
