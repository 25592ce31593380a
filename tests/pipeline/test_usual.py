"""A run that names no schedule is never slower, and holds no more, than by those of before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_dhellam.agreed import _scheme
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.pipeline.schedules import (
    AUTO,
    SCHEDULES,
    Placement,
    begun,
    kept,
    peak_activations,
    placement_of,
    scheme_of,
)
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.pipeline import UniformCosts, play
from lightning_dhellam.search.pipeline.links import Link
from tests.models.llama import SMALL
from tests.ranks import run_ranks

ALONE, SHARED = (1, 1, 1), (2, 1, 1)
CHUNK = UniformCosts(0.5, 0.5, 0.5)
COSTS = {
    "alike": CHUNK,
    "short weights": replace(CHUNK, input=0.55, weight=0.4),
    "nearly all frozen": replace(CHUNK, weight=0.02),
    "modules of a user's own": replace(CHUNK, input=1.0, weight=0.0),
}
"""Seconds of half a stage's layers, which do not communicate."""
LINKS = {"none": None, "copy engines": Link(1.0), "kernels": Link(1.0, takes=0.33)}


def _seconds(name: str, stages: int, count: int, costs: UniformCosts, link: Link | None) -> float:
    if name == "1f1b":  # whose chunks are whole stages
        twice = {part: 2 * getattr(costs, part) for part in ("forward", "input", "weight")}
        costs = replace(costs, **twice)
    return play(SCHEDULES[name](stages, count), costs, link).seconds


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("link", LINKS)
def test_nothing_with_a_name_beats_it_where_layers_do_not_communicate(
    link: str, stages: int
) -> None:
    usual = begun(None, stages, ALONE)
    # Of a backward that does not come apart one micro-batch is sent half as often by 1f1b.
    for of in COSTS if link == "none" else ("alike", "short weights"):
        costs = replace(COSTS[of], message=0.02 * (link != "none"))
        for count in (1, 2, stages - 1, stages, stages + 1, 2 * stages, 4 * stages):
            taken = _seconds(usual, stages, count, costs, LINKS[link])
            for other in ("fold", "1f1b", "dualpipe-v"):
                least = _seconds(other, stages, count, costs, LINKS[link])
                assert taken <= least * (1 + 1e-9), f"{of}, {count} micro-batches by {other}"


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("hidden", [0.0, 0.08, 0.15, 0.25])
def test_it_is_ahead_of_the_fold_whatever_two_strands_hide(hidden: float, stages: int) -> None:
    costs = replace(CHUNK, both=1.5 * (1 - hidden))
    usual = begun(None, stages, SHARED)
    for count in (1, 2, stages - 1, stages, stages + 1, 2 * stages, 4 * stages):
        taken = _seconds(usual, stages, count, costs, None)
        assert taken <= _seconds("fold", stages, count, costs, None) * (1 + 1e-9)


@pytest.mark.parametrize("shared", [ALONE, SHARED])
def test_it_holds_no_more_than_the_fold_and_hardly_more_than_1f1b(
    shared: tuple[int, int, int],
) -> None:
    for stages in (2, 3, 4, 8):
        for count in (*range(1, 2 * stages + 3), 4 * stages):

            def peak(name: str, stages: int = stages, count: int = count) -> int:
                return max(map(peak_activations, SCHEDULES[name](stages, count).visits))

            most = peak(begun(None, stages, shared))
            assert most <= peak("fold")
            assert most <= 2 * peak("1f1b") + (shared != ALONE)  # in halves of a stage


@pytest.mark.parametrize("remade", ["auto", "full", ["act"], {"0-1": "selective"}, {"head": "act"}])
def test_what_backward_makes_again_or_fetches_is_not_left_for_a_second_half(remade: Any) -> None:
    assert begun(None, 4, ALONE, remade) == begun(AUTO, 4, SHARED, remade) == "fold"
    assert begun(None, 4, ALONE, "none", "all") == begun(None, 4, SHARED, "none", ["act"]) == "fold"
    assert begun("zb-v", 4, ALONE, remade) == "zb-v"
    for light in ("none", "gathers", ["gathers"], {"0": "none"}, {}):
        assert begun(None, 4, ALONE, light) == "zb-v"


def test_it_follows_from_the_sizes() -> None:
    assert begun(None, 1, SHARED) == begun(AUTO, 1, ALONE) == "fold"
    for name in (None, AUTO):
        assert begun(name, 2, ALONE) == "zb-v"
        for shared in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
            assert begun(name, 2, shared) == "dualpipe-v"
        assert placement_of(name, 3) == Placement.folded(3)
    assert begun("1f1b", 4, SHARED) == "1f1b"
    assert Topology(8, 0, tp_size=2, cp_size=2, ep_size=4, etp_size=1).shared == (2, 2, 4)


def test_a_plan_file_keeps_the_schedule_that_it_was_searched_with(tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    PlanFile({}, {}, schedule=kept("fold", SCHEDULES["fold"])).save(path)
    topology = Topology(2, 0, pp_size=2)
    assert _scheme(AUTO, path, topology) == ("fold", scheme_of("fold", 2))
    # Plans alone say nothing of it.
    PlanFile({}, {}).save(path)
    assert _scheme(None, path, topology)[0] == "zb-v"


def _walked(rank: int, runs: list[dict[str, Any]]) -> list[str]:
    found = []
    for sizes in runs:
        with Runner.create(replace(SMALL, num_layers=4), "cpu", **sizes) as runner:
            assert runner.engine.stage.scheme is SCHEDULES[runner.agreed.schedule]
            found.append(runner.agreed.schedule)
    return found


def test_runs_walk_by_it() -> None:
    two = {"pipeline_parallel_size": 2}
    others = [
        {**two, "schedule": "fold"},
        {**two, "recompute": "full"},
        {"tensor_parallel_size": 2},
    ]
    assert run_ranks(2, _walked, [two, *others]) == [["zb-v", "fold", "fold", "fold"]] * 2
    shared = [{**two, "tensor_parallel_size": 2}, {**two, "context_parallel_size": 2}]
    assert run_ranks(4, _walked, shared) == [["dualpipe-v", "dualpipe-v"]] * 4
