"""`recompute="auto"` without a search: what the memory asks for, and no bit of difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.memory.fitting import SHARE
from lightning_dhellam.runner import Runner
from tests.engine.harness import batch_of
from tests.models.llama import SMALL
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=6, hidden_dropout=0.1)
SIZES: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "fold": {"pipeline_parallel_size": 2, "schedule": "fold"},
    "zb-v": {"pipeline_parallel_size": 2, "schedule": "zb-v"},
}

ROOM = {"tensor": 0.67, "fold": 0.67, "zb-v": 0.85}
"""Share of the memory that there is: what first halves of backward leave for the second stays."""


def _trained(**options: Any) -> tuple[list[float], Any, int, int]:
    """Losses of two steps, what is made again, bytes of slots at once, and of all that stays."""
    with Runner.create(CONFIG, micro_batch_size=1, plan="dhellam", **options) as runner:
        optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.01))
        losses = []
        for _ in range(2):
            loss = runner.train(batch_of(CONFIG, 5, 64))
            optimizer.step()
            losses.append(float(runner.mean(loss)))
        peak = runner.engine.lanes.ledger.peak_bytes
        return losses, runner.agreed.recompute, peak, runner.model_states.total


def _on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sizes in SIZES.items():
        kept, _, most, held = _trained(**sizes, recompute="none")
        # Of what it would take; the other rank has another limit.
        limit = round((held + ROOM[name] * most) / SHARE)
        losses, what, peak, _ = _trained(**sizes, recompute="auto", memory_limit=limit)
        found[name] = {"losses": (kept, losses), "what": what, "share": peak / most}
        with pytest.raises(ValueError, match="recompute='auto' finds nothing that fits") as caught:
            _trained(**sizes, recompute="auto", memory_limit=round(held * 1.05))
    return {**found, "error": str(caught.value)}


def test_a_limit_is_kept_and_changes_no_bit() -> None:
    outcomes = run_ranks(2, _on_rank)
    for name in SIZES:
        first, second = (outcome[name] for outcome in outcomes)
        assert first["what"] == second["what"]
        assert set(first["what"]) == {*map(str, range(CONFIG.num_layers)), "head"}
        assert any(value != "none" for value in first["what"].values())
        for outcome in (first, second):
            kept, limited = outcome["losses"]
            assert kept == limited
            assert outcome["share"] <= ROOM[name], name
    assert all("MiB at the least" in outcome["error"] for outcome in outcomes)
