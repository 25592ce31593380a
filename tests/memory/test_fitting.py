"""What `recompute="auto"` makes again of a run that is only planned, and what transfers hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.memory import Run, predict
from lightning_dhellam.memory.activations import without_memory
from lightning_dhellam.memory.fitting import SHARE, transfer_bytes
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.pipeline.schedules import SCHEDULES
from lightning_dhellam.plan.by_layer import AUTO
from tests.engine.harness import CPU, add_main_grads
from tests.models.llama import SMALL

CONFIG = replace(SMALL, num_layers=8)
HIDDEN = 4 * SMALL.hidden_size
"""Bytes per token of what stages hand over."""


def _lowered(stages: int, rank: int, schedule: str = "fold") -> Lowered:
    with without_memory():
        context = planned_context(Topology(world_size=stages, rank=rank, pp_size=stages), CPU)
        model = CausalLM(CONFIG, context, torch.float32)
        add_main_grads(model)
        return lower(model, scheme=SCHEDULES[schedule])


@pytest.mark.parametrize(
    ("stages", "rank", "micro_batches", "tensors"),
    [
        (1, 0, 8, 0),
        # Stage 0 sends or receives one of each strand in a walk, and turns at nothing else.
        (2, 0, 8, 4),
        # At the turn a walk receives and sends both strands: its own, the next, and the last two.
        (2, 1, 8, 8),
        # One alone: forward, with the way back asked for, and then back.
        (2, 1, 1, 3),
    ],
)
def test_transfers_hold_what_is_received_ahead_and_sent(
    stages: int, rank: int, micro_batches: int, tensors: int
) -> None:
    lowered = _lowered(stages, rank)
    step = lowered.stage.step(micro_batches)
    assert transfer_bytes(lowered.layers, step) == tensors * HIDDEN


def test_halves_of_backward_hand_on_once() -> None:
    lowered = _lowered(2, 1, "zb-v")
    whole = _lowered(2, 1)
    split = transfer_bytes(lowered.layers, lowered.stage.step(8))
    # Single strands, of which those for weights neither send nor receive.
    assert 0 < split <= transfer_bytes(whole.layers, whole.stage.step(8))


def test_auto_is_predicted_between_none_and_full() -> None:
    run = Run(CONFIG, Topology(world_size=2, pp_size=2), 6, 64, precision="32-true")
    peaks = {
        one: [rank.activations for rank in predict(replace(run, recompute=one))]
        for one in ("none", "full", AUTO)
    }
    assert peaks[AUTO] == peaks["full"], "what it takes at the least, where no limit is known"
    (first, _) = predict(replace(run, recompute="none"))
    room = (peaks["none"][0] + peaks["full"][0]) // 2
    limit = round((first.tensors - first.activations + room) / SHARE)
    found = predict(replace(run, recompute=AUTO, memory_limit=limit))[0].activations
    assert peaks["full"][0] < found < peaks["none"][0] and found <= room * 1.05
    whole = predict(replace(run, recompute=AUTO, memory_limit=1 << 40))
    assert [rank.activations for rank in whole] == peaks["none"]
    nothing = predict(replace(run, recompute=AUTO, memory_limit=1))
    assert [rank.activations for rank in nothing] == peaks["full"], "which is then refused"
