"""`recompute="auto"` without a search: what the memory asks for, and no bit of difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from lightning_dhellam.memory.fitting import SHARE
from lightning_dhellam.plan import nominal
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


class Trained(NamedTuple):
    """Two steps: their losses, gradients and what is made again, on the host, and held.

    Attributes:
        peak: bytes of slots at once.
        states: bytes of all that stays.
    """

    losses: list[float]
    gradients: list[torch.Tensor]
    recompute: Any
    offload: Any
    peak: int
    states: int


def _trained(**options: Any) -> Trained:
    with Runner.create(CONFIG, micro_batch_size=1, plan="dhellam", **options) as runner:
        parameters = list(runner.model.parameters())
        optimizer = runner.optimizer(torch.optim.AdamW(parameters, lr=0.01))
        losses, gradients = [], []
        for _ in range(2):
            loss = runner.train(batch_of(CONFIG, 5, 64))
            gradients += [p.main_grad.clone() for p in parameters]
            optimizer.step()
            losses.append(float(runner.mean(loss)))
        peak, agreed = runner.engine.lanes.ledger.peak_bytes, runner.agreed
        states = runner.model_states.total
        return Trained(losses, gradients, agreed.recompute, agreed.offload, peak, states)


def _same(one: Trained, other: Trained) -> bool:
    pairs = zip(one.gradients, other.gradients, strict=True)
    return one.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)


def _on_rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sizes in SIZES.items():
        kept = _trained(**sizes, recompute="none")
        # Of what it would take; the other rank has another limit.
        limit = round((kept.states + ROOM[name] * kept.peak) / SHARE)
        limited = _trained(**sizes, recompute="auto", memory_limit=limit)
        found[name] = {
            "same": _same(kept, limited),
            "what": limited.recompute,
            "share": limited.peak / kept.peak,
        }
        with pytest.raises(ValueError, match="recompute='auto' finds nothing that fits") as caught:
            _trained(**sizes, recompute="auto", memory_limit=round(kept.states * 1.05))
    return {**found, "error": str(caught.value)}


def test_a_limit_is_kept_and_changes_no_bit() -> None:
    outcomes = run_ranks(2, _on_rank)
    for name in SIZES:
        first, second = (outcome[name] for outcome in outcomes)
        assert first["what"] == second["what"]
        assert set(first["what"]) == {*map(str, range(CONFIG.num_layers)), "head"}
        assert any(value != "none" for value in first["what"].values())
        for outcome in (first, second):
            assert outcome["same"], name
            assert outcome["share"] <= ROOM[name], name
    assert all("MiB at the least" in outcome["error"] for outcome in outcomes)


def _beside_the_host(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nominal, "HOST_LINK", 1e5 * nominal.HOST_LINK)  # so fast that all hides
        for name, sizes in SIZES.items():
            kept = _trained(**sizes, recompute="none")
            limit = round((kept.states + ROOM[name] * kept.peak) / SHARE)
            limited, free = (
                _trained(**sizes, recompute="auto", offload="auto", memory_limit=room)
                for room in (limit, 2**30)
            )
            found[name] = {
                "same": _same(kept, limited) and _same(kept, free),
                "away": (limited.offload, free.offload),
                "again": list(free.recompute.values()),
                "share": limited.peak / kept.peak,
            }
    return found


def test_the_host_is_chosen_where_its_link_hides_and_changes_no_bit() -> None:
    outcomes = run_ranks(2, _beside_the_host)
    for name in SIZES:
        first, second = (outcome[name] for outcome in outcomes)
        assert first["away"] == second["away"]
        limited, free = first["away"]
        assert limited and set(limited) <= {*map(str, range(CONFIG.num_layers)), "head"}
        assert free == {} and {*first["again"]} == {"none"}, "there is room for all"
        for outcome in (first, second):
            assert outcome["same"], name
            assert outcome["share"] <= ROOM[name], name
