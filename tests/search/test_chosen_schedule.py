"""What is chosen for 80 layers of Llama-3-70B width on 8 stages, by a profile of two H200."""

from __future__ import annotations

from pathlib import Path

from lightning_dhellam.pipeline.schedules import (
    Placement,
    dual_pipe_v,
    fold,
    verify,
    zero_bubble_v,
)
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import (
    Effort,
    LayerCosts,
    Link,
    layers_of,
    play,
    rank,
    searched,
)
from lightning_dhellam.search.pipeline.layers import cut_folded

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "benchmarks/multi_gpu/a8-tp2-nvidia-h200-2026-11-25/profile.json"
STAGES, MICRO_BATCHES, LAYERS, TOKENS = 8, 32, 80, 8192
LINK = Link(244e9, 10e-6, 32 / 132)
"""NCCL's send and receive between two H200 (2026-11-29), and its share of multiprocessors."""


def test_the_chosen_schedule_is_ahead_of_the_fold_and_not_behind_torchs() -> None:
    """Ours are torch's, action by action (`tests/pipeline/test_torch_schedules.py`)."""
    costs = Costs.of(Profile.load(PROFILE))
    chunks = cut_folded(layers_of(Profile.load(PROFILE), LAYERS), costs, STAGES)
    known = LayerCosts(chunks, costs, tokens=TOKENS)
    folded = fold(STAGES, MICRO_BATCHES)
    torchs = [zero_bubble_v(STAGES, MICRO_BATCHES), dual_pipe_v(STAGES, MICRO_BATCHES)]
    limit = max(use.peak for use in play(torchs[1], known).stages)
    found = searched(
        Placement.folded(STAGES),
        MICRO_BATCHES,
        known,
        LINK,
        limits=[limit] * STAGES,
        known=[folded, *torchs],
        effort=Effort(starts=30, improved=1, moves=300),
    )
    verify(found)
    ranking = rank([folded, *torchs, found], known, LINK, limits=[limit] * STAGES)
    seconds = {one.run.schedule.name: one.run.seconds for one in ranking}
    assert seconds["searched"] <= min(seconds["zb-v"], seconds["dualpipe-v"])
    assert seconds["fold"] / seconds["searched"] >= 1.08
    assert all(one.over == 0.0 for one in ranking)
