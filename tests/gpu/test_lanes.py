"""Real streams under stress: a missing event or an early free must show in the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine.lanes import CudaLanes
from lightning_dhellam.plan import BUILDERS, Builder, Lane
from tests.gpu.synthetic import Step
from tests.plan.graphs import random_builder

PLANS: dict[str, Builder] = BUILDERS | {f"random-{s}": random_builder(s) for s in range(100)}


def _wrong(step: Step, expected: list[Tensor], plans: int, poison: bool) -> list[str]:
    """Names of the first plans whose outcome differs from the sequential one's."""
    wrong = []
    for name in list(PLANS)[:plans]:
        outcome = step.outcome(PLANS[name], poison=poison)
        if not all(map(torch.equal, outcome, expected)):
            wrong.append(name)
    return wrong


def _expected(step: Step) -> list[Tensor]:
    expected = step.sequential()
    assert all(torch.isfinite(tensor).all() and tensor.norm() > 0 for tensor in expected)
    return expected


def test_the_synthetic_step_on_the_cpu() -> None:
    step = Step(torch.device("cpu"))
    assert _wrong(step, _expected(step), 20, poison=True) == []


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [False, True], ids=["reused", "poisoned"])
def test_no_plan_changes_a_bit_while_lanes_lag_behind_each_other(
    poison: bool, device: torch.device
) -> None:
    step = Step(device)
    expected = _expected(step)
    on_cpu = Step(torch.device("cpu")).sequential()
    for actual, reference in zip(expected, on_cpu, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
    assert _wrong(step, expected, len(PLANS), poison) == []


@pytest.mark.gpu
def test_the_stress_finds_a_missing_wait(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(device)
    expected = _expected(step)
    monkeypatch.setattr(CudaLanes, "_wait", lambda *args: None)
    assert _wrong(step, expected, 10, poison=False)


@pytest.mark.gpu
@pytest.mark.parametrize("poison", [False, True], ids=["reused", "poisoned"])
def test_the_stress_finds_memory_that_is_freed_too_early(
    poison: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(device)
    expected = _expected(step)
    monkeypatch.setattr(CudaLanes, "_passed", lambda *args: True)
    assert _wrong(step, expected, 30, poison)


@pytest.mark.gpu
def test_everything_is_free_when_the_step_ends(device: torch.device) -> None:
    step = Step(device)
    for name in list(PLANS)[:10]:
        engine = step.engine(PLANS[name])
        engine.train(step.micro_batches())
        lanes = engine.lanes
        assert isinstance(lanes, CudaLanes)
        assert lanes.ledger.slots == 0
        assert not any(lanes._waiting.values()), f"{name}: memory is held beyond the step"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_work_on_a_lane_sees_the_gradients_that_were_announced(device: torch.device) -> None:
    step = Step(device)
    expected = _expected(step)[1:]
    for name in list(PLANS)[:20]:
        engine = step.engine(PLANS[name])
        for weight in step.weights:
            weight.main_grad.zero_()
        seen: dict[int, Tensor] = {}

        def on_gradient(
            parameters: tuple[Any, ...], engine: Any = engine, seen: dict[int, Tensor] = seen
        ) -> None:
            with engine.lanes.on(Lane.DP):
                torch.cuda._sleep(50_000)
                for parameter in parameters:
                    seen[id(parameter)] = parameter.main_grad.clone()

        engine.train(step.micro_batches(), on_gradient)
        torch.cuda.synchronize()
        for weight, gradient in zip(step.weights, expected, strict=True):
            assert torch.equal(seen[id(weight)].cpu(), gradient), name
