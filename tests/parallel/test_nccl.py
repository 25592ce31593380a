"""What NCCL and the driver are told. NCCL itself is in tests/gpu."""

from __future__ import annotations

import pytest
import torch
import yaml
from megatron.core.parallel_state import get_nccl_options

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext, nccl
from lightning_dhellam.parallel.transport import Alone
from lightning_dhellam.plan import Collective, Lane
from tests.models.llama import SMALL
from tests.plan.real_graphs import context_of_rank_0
from tests.ranks import run_ranks


def test_megatron_reads_the_settings() -> None:
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch without NCCL")
    settings = yaml.safe_load(nccl.CONFIGURATION.read_text())
    options = get_nccl_options("tp", settings)
    assert options.config.max_ctas == nccl.processors(Lane.TP, Collective.ALL_GATHER) > 0
    assert options.is_high_priority_stream
    untouched = torch.distributed.ProcessGroupNCCL.Options()
    for lane in (Lane.CP, Lane.EP):
        options = get_nccl_options(lane, settings)
        assert options.is_high_priority_stream
        assert options.config.max_ctas == untouched.config.max_ctas, "an all-to-all wants them all"


def test_processors_are_those_of_the_lane_and_the_collective() -> None:
    for collective in Collective:
        assert nccl.processors(Lane.TP, collective) <= 16
        assert nccl.processors(Lane.EP, collective) >= nccl.processors(Lane.TP, collective)
    assert nccl.processors(Lane.EP, Collective.ALL_TO_ALL) > 16


class _LikeNccl(Alone):
    """Takes as many processors as NCCL on a lane."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane

    def processors(self, collective: Collective) -> int:
        return nccl.processors(self._lane, collective)


@pytest.mark.parametrize(
    ("sizes", "exchange", "expected"),
    [((1, 2), "ring", 16), ((1, 2), "all_gather", 24), ((2, 1), "ring", 16), ((1, 1), "ring", 0)],
)
def test_gemms_leave_what_the_collectives_of_the_layers_take(
    sizes: tuple[int, int], exchange: str, expected: int
) -> None:
    context = context_of_rank_0(*sizes)
    model = CausalLM(SMALL, context, torch.float32)
    layers = lower(model, context_exchange=exchange).layers
    for lane in (Lane.TP, Lane.CP, Lane.EP):
        context = context.through(lane, _LikeNccl(lane))
    assert context.processors(layers) == expected


def _on_gloo(rank: int) -> tuple[object, int]:
    context = ParallelContext.create(torch.device("cpu"), tensor_parallel_size=2)
    return nccl.high_priority(), context.communicators[Lane.TP].processors(Collective.ALL_GATHER)


def test_gloo_takes_no_processors_and_has_no_priorities() -> None:
    assert run_ranks(2, _on_gloo) == [(None, 0)] * 2


@pytest.mark.parametrize("given", ["1", "7", "many"])
def test_too_few_queues_are_told(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nccl.QUEUES, given)
    assert nccl.open_queues().startswith(f"CUDA_DEVICE_MAX_CONNECTIONS={given} lets lanes share")


@pytest.mark.parametrize("given", ["8", "32"])
def test_what_the_user_has_set_stays(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nccl.QUEUES, given)
    assert nccl.open_queues() == ""


def test_queues_are_opened_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    monkeypatch.setattr(nccl.os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert nccl.open_queues() == "" and environment == {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert nccl.open_queues() == "" and environment == {nccl.QUEUES: "32"}
