"""What `recompute="auto"` makes again of a run that is planned, and what it counts for that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.memory import Run, predict
from lightning_dhellam.memory.activations import activation_peak, without_memory
from lightning_dhellam.memory.fitting import SHARE, Fitted, fit, step_bytes, transfer_bytes
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.pipeline.schedules import SCHEDULES
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.by_layer import AUTO, ByLayer
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.search.model import Costs
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
    sizes = Topology(world_size=2, pp_size=2)
    run = Run(CONFIG, sizes, 6, 64, precision="32-true", schedule="fold")
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


class Chooser:
    """Chooses for a stage of eight micro-batches, and has the engine walk what was chosen."""

    LENGTH, MICRO_BATCHES = 128, 8

    def __init__(self, stages: int = 1, rank: int = 0, schedule: str = "fold", **options: str):
        self._topology = Topology(world_size=stages, rank=rank, pp_size=stages)
        self._schedule, self._options = schedule, options
        self._whole, self._kept = self._lowered("full"), self._lowered("none")

    def _lowered(self, recompute: Recompute | ByLayer) -> Lowered:
        config = replace(CONFIG, num_layers=4, hidden_size=256, ffn_hidden_size=512)
        model = CausalLM(config, planned_context(self._topology, CPU), torch.bfloat16)
        add_main_grads(model)
        found = lower(
            model,
            recompute=recompute,
            scheme=SCHEDULES[self._schedule],
            kernels={"fp8": "reference"},
            **self._options,
        )
        return replace(found, layers=tuple(pair.at(self.LENGTH) for pair in found.layers))

    def fitted(self, room: float) -> Fitted:
        graphs = [g for pair in self._whole.layers for g in (pair.forward, pair.backward)]
        costs = replace(Costs.nominal(graphs, self.LENGTH), inline=True)
        return fit(
            self._whole.layers,
            self._kept,
            costs,
            micro_batches=self.MICRO_BATCHES,
            tokens=self.LENGTH,
            room=room,
            builder=BUILDERS["sequential"],
        )

    def walked(self, fitted: Fitted) -> int:
        return activation_peak(
            self._lowered(fitted.choices),
            BUILDERS["sequential"],
            self._topology,
            samples=self.MICRO_BATCHES,
            micro_batch_size=1,
            length=self.LENGTH,
        ).slots

    @property
    def transfers(self) -> float:
        step = self._kept.stage.step(self.MICRO_BATCHES)
        return self.LENGTH * transfer_bytes(self._kept.layers, step)

    @property
    def of_step(self) -> int:
        return step_bytes(self._kept.layers)


@pytest.mark.parametrize("fp8", ["current", "blockwise"])
def test_weights_in_8_bits_live_beside_what_is_chosen(fp8: str) -> None:
    with without_memory():
        chooser = Chooser(fp8=fp8)
        kept = chooser.fitted(torch.inf)
        first = chooser.walked(kept)
        fitted = chooser.fitted(0.9 * (first - chooser.of_step) + chooser.of_step)
        second = chooser.walked(fitted)
    assert fitted.chosen.peak_bytes < kept.chosen.peak_bytes and second < first
    for found, walked in ((kept, first), (fitted, second)):
        # Of a tensor's own scale, 4 bytes, slots per token know nothing.
        assert 0 <= walked - found.chosen.peak_bytes - chooser.of_step < 1e-4 * walked


@pytest.mark.parametrize("schedule", ["fold", "zb-v", "dualpipe-v"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_halves_of_backward_leave_is_counted(schedule: str, rank: int) -> None:
    with without_memory():
        chooser = Chooser(2, rank, schedule)
        kept = chooser.fitted(torch.inf)
        fitted = chooser.fitted(0.9 * (kept.chosen.peak_bytes + chooser.transfers))
        for found in (kept, fitted):
            peak = found.chosen.peak_bytes
            assert peak <= chooser.walked(found) <= peak + chooser.transfers
    assert fitted.chosen.peak_bytes < kept.chosen.peak_bytes
