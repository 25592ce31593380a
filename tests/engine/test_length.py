"""Nominal costs, and the plans made from them, are those of the sequences in use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.layers import Lowered
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.plan import BUILDERS, GraphPair, Plan
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure.graphfile import fields_of
from lightning_dhellam.search.model.cost import Costs
from tests.engine.harness import CPU, batch_of
from tests.models.llama import SMALL
from tests.plan.real_graphs import lowered
from tests.ranks import run_ranks

LENGTH, LONGEST = 8192, 131072
"""In use, and accepted by Llama 3.1."""
TINY = replace(SMALL, hidden_size=64, ffn_hidden_size=256, num_query_groups=4)
"""Whose default plan changes somewhere between the lengths of these tests."""
CONFIGS = {length: replace(TINY, max_sequence_length=length) for length in (LENGTH, LONGEST)}


def _plan(pair: GraphPair) -> Plan:
    return BUILDERS["interleaved"](pair.forward, pair.backward)


@pytest.fixture(scope="module")
def models() -> dict[int, Lowered]:
    return {length: lowered(4, config) for length, config in CONFIGS.items()}


def test_costs_and_plans_are_those_of_a_model_that_accepts_no_more(
    models: dict[int, Lowered],
) -> None:
    for long, short in zip(models[LONGEST].layers, models[LENGTH].layers, strict=True):
        suited = long.at(LENGTH)
        for one, other in ((suited.forward, short.forward), (suited.backward, short.backward)):
            assert fields_of(one) == fields_of(other)
            assert one.fingerprint == other.fingerprint
        assert _plan(suited) == _plan(short)


def test_only_attention_grows_with_the_sequence(models: dict[int, Lowered]) -> None:
    for pair in models[LONGEST].layers:
        for graph in (pair.forward, pair.backward):
            costs, other = (Costs.nominal([graph.at(n)], 1).seconds for n in (LENGTH, LONGEST))
            grown = {name for name in costs if costs[name] != other[name]}
            assert {name.split("/")[1] for name in grown} <= {"attention", "attention.grad"}
            assert len(grown) == (pair.name == "transformer")
            assert all(other[name] == pytest.approx(16 * costs[name]) for name in grown)


def test_the_default_plan_depends_on_the_length(models: dict[int, Lowered]) -> None:
    """Or else the tests here would say nothing."""
    layer = models[LONGEST].layers[1]
    assert _plan(layer) != _plan(layer.at(LENGTH))


def _runner(config: ModelConfig, **sizes: Any) -> Runner:
    runner = Runner.create(config, CPU, plan="interleaved", **sizes)
    runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.0))
    return runner


def _plans(runner: Runner) -> list[str]:
    return [str(plan) for plan in runner.engine.plans()]


def _train_two_lengths(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for longest in (64, 65536):
        config = replace(TINY, max_sequence_length=longest)
        with _runner(config, tensor_parallel_size=2) as runner:
            before = _plans(runner)
            runner.evaluate(batch_of(config, 2, 32))
            evaluated = _plans(runner)
            losses = [runner.train(batch_of(config, 2, 64)).item()]
            after = _plans(runner)
            losses.append(runner.train(batch_of(config, 2, 16)).item())
            found[str(longest)] = (before, evaluated, after, _plans(runner), losses)
    return found


def test_a_runner_plans_for_its_first_batch_of_training() -> None:
    for found in run_ranks(2, _train_two_lengths):
        before, evaluated, expected, _, losses = found["64"]
        assert before == expected, "nothing changes where sequences are as long as can be"
        before, evaluated, after, later, losses_of_longer = found["65536"]
        assert before == evaluated != expected
        assert after == expected
        assert later == after, "a plan must not change from step to step"
        assert losses_of_longer == losses


def _train_unequal_ranks(rank: int) -> list[list[str]]:
    config = replace(TINY, max_sequence_length=65536)
    with _runner(config, tensor_parallel_size=2) as runner:
        runner.train(batch_of(config, 2, 64 if runner.context.topology.dp_rank else 16))
        mixed = _plans(runner)
    with _runner(config, tensor_parallel_size=2) as runner:
        runner.train(batch_of(config, 2, 64))
        return [mixed, _plans(runner)]


def test_ranks_with_other_lengths_take_the_plan_of_the_longest() -> None:
    for mixed, longest in run_ranks(4, _train_unequal_ranks):
        assert mixed == longest
