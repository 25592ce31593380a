"""On a GPU layers in 8 bits train near bf16 by its own kernels, and no plan changes a bit."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import run_ranks
from tests.runner.test_eight_bits import FORMATS, SIZES, check, outcome

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


def gathered(rank: int, kind: str = "cuda") -> list[str]:
    """By which kernels gathers in 8 bits change a bit where all has one scale."""
    kernels = KERNELS if kind == "cuda" else ("reference",)
    device, differing = f"cuda:{rank}" if kind == "cuda" else kind, []
    for kernel in kernels:
        plain, eight = (
            outcome("current", device, SIZES["tp"], kernel, fp8_all_gather=eight)
            for eight in (False, True)
        )
        same = all(t.equal(plain[1][n]) for n, t in eight[1].items())
        if not same or not eight[0].equal(plain[0]):
            differing.append(kernel)
        outcome("blockwise", device, SIZES["tp"], kernel, fp8_all_gather=True)
    return differing


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs")
def test_gathers_in_8_bits_between_two_gpus() -> None:
    assert run_ranks(2, gathered, backend="nccl") == [[], []]
