"""All ranks must hold the same plan, and a plan file must suit the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dhellam.plan import Plan
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.strategy import DHellamStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import join, train

PLANS = ("sequential", "megatron")


def _train_with_own_plan(rank: int) -> str:
    join(rank, 2)
    with pytest.raises(ValueError) as error:
        train({"tensor_parallel_size": 2, "plan": PLANS[rank]})
    return str(error.value)


def test_ranks_with_different_plans_are_refused_on_every_rank() -> None:
    for plan, message in zip(PLANS, run_ranks(2, _train_with_own_plan), strict=True):
        assert message.startswith(f"plan='{plan}' orders the operators differently")


def _train_with_file(rank: int, path: str) -> tuple[list[float], list[float]]:
    join(rank, 1)
    return train({"plan": path}), train({"plan": "sequential"})


def test_a_plan_file_of_other_graphs_leaves_this_models_to_the_default(tmp_path: Path) -> None:
    plan = Plan.parse("plan mine: forward toy, backward -\n  0  forward   compute  gemm")
    file = tmp_path / "plan.json"
    PlanFile({("made-for", ""): plan}, {"made-for": "toy forward"}).save(file)
    ((ours, expected),) = run_ranks(1, _train_with_file, str(file))
    assert ours == expected


def test_a_stale_plan_file_is_refused(tmp_path: Path) -> None:
    plan = Plan.parse("plan mine: forward head, backward -\n  0  forward   compute  gemm")
    file = tmp_path / "plan.json"
    PlanFile({("made-for", ""): plan}, {"made-for": "head forward"}).save(file)
    with pytest.raises(ValueError, match=r"the plan file is stale: its 'head forward'"):
        run_ranks(1, _train_with_file, str(file))


def test_a_missing_plan_file_is_refused_when_the_strategy_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json"):
        DHellamStrategy(plan=str(tmp_path / "none.json"))
