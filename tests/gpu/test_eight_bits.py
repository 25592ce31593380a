"""On a GPU layers in 8 bits train near bf16 by its own kernels, and no plan changes a bit."""

from __future__ import annotations

import pytest
import torch

from tests.runner.test_eight_bits import FORMATS, check, outcome

pytestmark = pytest.mark.gpu
KERNELS = ("cublas", "triton")


@pytest.mark.parametrize("name", FORMATS)
def test_losses_and_gradients_are_near_bf16(name: str, device: torch.device) -> None:
    expected = outcome(None, str(device), {}, "")
    for kernel in KERNELS:
        check(outcome(name, str(device), {}, kernel), expected, FORMATS[name], (name, kernel))


@pytest.mark.parametrize("name", FORMATS)
def test_no_plan_changes_a_bit(name: str, device: torch.device) -> None:
    for kernel in KERNELS:
        expected = outcome(name, str(device), {}, kernel, plan="sequential")
        for plan in ("megatron", "dhellam", "interleaved"):
            losses, gradients, norm = outcome(name, str(device), {}, kernel, plan=plan)
            assert losses.equal(expected[0]) and norm == expected[2], (kernel, plan)
            wrong = [n for n, t in gradients.items() if not t.equal(expected[1][n])]
            assert not wrong, (kernel, plan, wrong)
