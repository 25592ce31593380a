"""Options that do nothing with the sizes of a run are named; those that do something are not."""

from __future__ import annotations

import warnings
from dataclasses import fields, replace
from inspect import signature
from typing import Any

import pytest

from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import Topology
from lightning_dhellam.strategy import DHellamStrategy
from lightning_dhellam.strategy import idle as rows
from lightning_dhellam.strategy.idle import idle
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, join, train

EXPERTS = replace(SHAPE, num_experts=4, experts_per_token=2)
WINDOWS = replace(SHAPE, sliding_window=4)
EIGHT: dict[str, Any] = {"fp8": "current", "kernels": {"fp8": "reference"}}
SIZES: dict[str, str] = {
    "tensor_parallel_size": "tp_size",
    "pipeline_parallel_size": "pp_size",
    "context_parallel_size": "cp_size",
}


def said(options: dict[str, Any], config: ModelConfig = SHAPE, world: int = 0) -> list[str]:
    """What is said of such options, in a world that one model fills unless it is given."""
    sizes = {field: options.get(name, 1) for name, field in SIZES.items()}
    ranks = world or sizes["tp_size"] * sizes["pp_size"] * sizes["cp_size"]
    expert_ranks = options.get("expert_tensor_parallel_size")
    topology = Topology(ranks, 0, **sizes, etp_size=expert_ranks)  # type: ignore[arg-type]
    return [*idle(DHellamStrategy(**options), topology, config)]


CASES: list[tuple[dict[str, Any], ModelConfig, str]] = [
    (
        {"fp8_all_gather": True, **EIGHT},
        SHAPE,
        "fp8_all_gather=True does nothing: with tensor_parallel_size=1 no layer is gathered; leave"
        " fp8_all_gather out",
    ),
    ({"context_fp8_keys": True}, SHAPE, "with context_parallel_size=1 no sequence is shared"),
    (
        {"context_fp8_keys": True, "context_parallel_size": 2},
        WINDOWS,
        "every layer of the model has a window, whose keys are gathered as they are",
    ),
    ({"context_fp32_gradients": False}, SHAPE, "context_fp32_gradients=False does nothing: with"),
    ({"context_exchange": "all_gather"}, SHAPE, "context_exchange='all_gather' does nothing"),
    ({"context_transport": "nccl"}, SHAPE, "context_transport='nccl' does nothing: with context_p"),
    (
        {"context_transport": "nccl", "context_parallel_size": 2, "context_exchange": "all_gather"},
        SHAPE,
        "with context_exchange='all_gather' keys and values go round in no ring",
    ),
    ({"pipeline_transport": "nccl"}, SHAPE, "with pipeline_parallel_size=1 there is one stage"),
    ({"expert_tensor_parallel_size": 1}, SHAPE, "the model has no experts"),
    ({"bucket_size": 1000}, SHAPE, "no two ranks hold the same weights, so no gradient is"),
    (
        {"kernels": {"fp8": "reference"}},
        SHAPE,
        "kernels={fp8: reference} does nothing: with fp8=None nothing is in 8 bits; leave fp8 out",
    ),
    ({"kernels": {"grouped": "reference"}}, SHAPE, "the model has no experts; leave grouped out"),
    ({"kernels": {"merge": "reference"}}, SHAPE, "no sequence is shared; leave merge out"),
    ({"kernels": {"permute": "reference"}}, SHAPE, "the model has no experts; leave permute out"),
]
ACTIVE: list[tuple[dict[str, Any], ModelConfig, int]] = [
    ({"fp8_all_gather": True, "tensor_parallel_size": 2, **EIGHT}, SHAPE, 0),
    (
        {
            "context_parallel_size": 2,
            "context_fp8_keys": True,
            "context_fp32_gradients": False,
            "context_transport": "nccl",
            "kernels": {"merge": "reference"},
        },
        replace(WINDOWS, num_layers=2, window_layers=(1, 0)),
        0,
    ),
    ({"context_parallel_size": 2, "context_exchange": "all_gather"}, SHAPE, 0),
    ({"pipeline_parallel_size": 2, "pipeline_transport": "nccl"}, SHAPE, 0),
    (
        {
            "expert_tensor_parallel_size": 1,
            "kernels": {"grouped": "reference", "permute": "reference"},
        },
        EXPERTS,
        0,
    ),
    ({"bucket_size": 1000}, SHAPE, 2),
    # Its state is cut where buckets end.
    ({"bucket_size": 1000, "distributed_optimizer": True}, SHAPE, 0),
    # What decides by itself asks for nothing.
    ({"context_exchange": "auto", "schedule": "auto", "recompute": "auto"}, SHAPE, 0),
    ({}, SHAPE, 0),
]


@pytest.mark.parametrize(("options", "config", "message"), CASES, ids=lambda one: str(one)[:40])
def test_what_does_nothing_is_named(
    options: dict[str, Any], config: ModelConfig, message: str
) -> None:
    (line,) = said(options, config)
    assert message in line


@pytest.mark.parametrize(("options", "config", "world"), ACTIVE, ids=lambda one: str(one)[:40])
def test_what_does_something_is_not(
    options: dict[str, Any], config: ModelConfig, world: int
) -> None:
    assert said(options, config, world) == []


def test_options_are_named_as_users_spell_them_and_by_default_ask_for_nothing() -> None:
    known = signature(DHellamStrategy.__init__).parameters
    for option in rows._OPTIONS:
        assert known[option.name].default == option.left_out[0]
    assert {field.name for field in fields(Topology)} >= set(SIZES.values())


def _warned(rank: int, options: dict[str, Any]) -> list[str]:
    join(rank, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(options, max_steps=1)
    return [str(one.message) for one in caught if "does nothing" in str(one.message)]


def test_a_run_says_so_once_and_goes_on() -> None:
    (warned,) = run_ranks(1, _warned, {"context_fp8_keys": True, "bucket_size": 1000})
    assert [line.split("=")[0] for line in warned] == ["context_fp8_keys", "bucket_size"]
