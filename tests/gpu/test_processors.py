"""GEMMs that leave multiprocessors free: communication begins beside them, and no bit changes."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine import OperatorTimer, Subject, make_lanes
from lightning_dhellam.engine.lanes import CudaLanes
from lightning_dhellam.kernels.linear import processors
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import Link, ParallelContext
from lightning_dhellam.parallel.link import EmulatedLink
from lightning_dhellam.plan import BUILDERS, Lane, Operator
from tests.engine.harness import add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.llama import relative_error
from tests.plan.graphs import sparing

pytestmark = pytest.mark.gpu

FREE = 16
CARRIED = 40 << 20
"""Bytes of a transfer: 0.21 ms at 200 GB/s."""
CONFIG = ModelConfig(2, 2048, 4096, 16, 4, 1024, max_sequence_length=2048)


def _target() -> int:
    count = ctypes.c_int()
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    assert not processors._cublas().cublasGetSmCountTarget(handle, ctypes.byref(count))
    return count.value


def test_gemms_of_a_step_leave_processors_and_those_after_it_do_not(device: torch.device) -> None:
    model = CausalLM(CONFIG, ParallelContext.single(device), torch.bfloat16)
    add_main_grads(model)
    lowered = lower(model)
    batch = {name: value.to(device) for name, value in batch_of(CONFIG, 3, 2048).items()}
    micro_batches = pieces(batch, 1, model.context)
    lanes = make_lanes(device, processors=FREE)
    engine = engine_of(lowered, device, BUILDERS["sequential"], lanes)
    plain, gradients = train(engine, model, micro_batches)
    seen: dict[bool, set[int]] = {True: set(), False: set()}
    launch = lanes.launch

    def watched(operator: Operator, *args: Any) -> Any:
        seen[operator.shrinks].add(_target())
        return launch(operator, *args)

    lanes.launch = watched  # type: ignore[method-assign]
    engine.install(sparing("sequential"))
    expected = train(engine, model, micro_batches)
    engine.install(sparing("interleaved"))
    assert differing(train(engine, model, micro_batches), expected) == []
    all_of_them = torch.cuda.get_device_properties(device).multi_processor_count
    assert seen == {True: {all_of_them - FREE}, False: {0}}
    assert _target() == 0, "GEMMs after the step have all processors"
    # Small GEMMs may be added up in another order; `same_bits` tells which.
    assert abs(expected[0] - plain) <= 1e-3 * plain
    errors = {name: relative_error(expected[1][name], value) for name, value in gradients.items()}
    assert max(errors.values()) <= 1e-2, errors


def test_the_timer_compares_what_operators_compute_both_ways(device: torch.device) -> None:
    lanes = make_lanes(device, processors=FREE)
    timer = OperatorTimer(lanes, None)
    x, weight = (torch.randn(4096, 4096, device=device).bfloat16() for _ in range(2))
    gemm = Operator("gemm", Lane.COMPUTE, ("x",), ("y",), lambda x: x @ weight, shrinks=True)
    assert timer.same_bits(Subject(gemm, [x]))

    def by_target(x: torch.Tensor) -> torch.Tensor:
        return x + _target()

    other = replace(gemm, run=by_target)
    assert not timer.same_bits(Subject(other, [x]))
    assert not OperatorTimer(make_lanes(device), None).same_bits(Subject(gemm, [x]))


@pytest.mark.parametrize(("free", "sms"), [(0, FREE), (FREE, FREE), (0, 0)])
def test_a_profile_counts_what_communication_waits_for_a_gemm(
    free: int, sms: int, device: torch.device
) -> None:
    link = EmulatedLink(Link(bandwidth=200e9, sms=sms), device)
    x, weight = (
        torch.randn(8192, 8192, device=device).bfloat16(),
        torch.empty(32768, 8192, device=device, dtype=torch.bfloat16).normal_(),
    )
    y = torch.empty(8192, 32768, device=device, dtype=torch.bfloat16)
    timer = OperatorTimer(make_lanes(device, processors=free), None, repeats=12)
    gemm = Operator("gemm", Lane.COMPUTE, ("x",), ("y",), lambda x: torch.mm(x, weight.t(), out=y))
    gather = Operator("gather", Lane.TP, ("x",), ("z",), lambda x: link.carry(CARRIED))
    with timer.sharing(spare=True):
        for _ in range(2):  # at first the host is late
            waited, computed = timer.behind(Subject(gather, [x]), Subject(gemm, [x]), 20e-6)
    begins_at_once = [a < b / 2 for a, b in zip(waited, computed, strict=True)]
    assert begins_at_once == [bool(free) or not sms] * 12, (waited, computed)


def test_what_runs_for_long_leaves_the_time_of_its_pauses(device: torch.device) -> None:
    link = EmulatedLink(Link(bandwidth=200e9, sms=FREE), device)
    asked = CARRIED / 200e9
    x, weight = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    timer = OperatorTimer(make_lanes(device, processors=FREE), None)
    gemm = Subject(Operator("gemm", Lane.COMPUTE, ("x",), ("y",), lambda x: x @ weight), [x])
    run = lambda x: link.carry(CARRIED)  # noqa: E731
    gather = Subject(Operator("gather", Lane.TP, ("x",), ("z",), run), [x])
    full = timer.sustained([gemm, gemm], 0.1, 0.0, [(gather, gemm), (gather, gemm)])
    paused = timer.sustained([gemm, gemm], 0.1, 0.5)
    assert 0 < paused.share < full.share <= 1
    assert full.after > 1.8 * asked, "a link is no faster than it is paced"
    assert paused.after == 0.0


@pytest.mark.parametrize("free", [0, FREE])
def test_communication_begins_beside_a_gemm_that_leaves_processors(
    free: int, device: torch.device
) -> None:
    lanes = make_lanes(device, processors=free)
    assert isinstance(lanes, CudaLanes)
    link = EmulatedLink(Link(bandwidth=200e9, sms=FREE), device)
    # Long enough that the link's 0.2 ms end within it, if they begin within it.
    x, weight = (
        torch.randn(8192, 8192, device=device).bfloat16(),
        torch.empty(32768, 8192, device=device, dtype=torch.bfloat16).normal_(),
    )
    compute, communication = lanes.stream(Lane.COMPUTE), lanes.stream(Lane.TP)
    for _ in range(2):
        torch.cuda.synchronize()
        gemm_ends, link_ends = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        lanes.share(spare=True)
        with torch.cuda.stream(compute):
            torch.cuda._sleep(1_000_000)
            ready = torch.cuda.Event()
            ready.record()
            torch.mm(x, weight.t())
            gemm_ends.record()
        communication.wait_event(ready)
        with torch.cuda.stream(communication):
            torch.cuda._sleep(100_000)  # the GEMM has begun
            link.carry(CARRIED)
            link_ends.record()
        lanes.share(spare=False)
        torch.cuda.synchronize()
    assert (link_ends.elapsed_time(gemm_ends) > 0) == bool(free)
