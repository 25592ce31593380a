"""All schedules on one model: the same rules for all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.search.pipeline import Link, Setting, compare
from lightning_dhellam.search.report import comparison_table
from lightning_dhellam.search.solve import Budget, solve
from tests.search.graphs import TOKENS, costs, graphs_of, model

NAMES = ["1f1b", "interleaved-1f1b", "zb-v", "dualpipe-v", "fold"]
LAYERS = model(24)


def setting(slowdowns: bool = False, **changes: Any) -> Setting:
    """Four stages, eight micro-batches of a model of 70B width at 200 GB/s."""
    given = costs(graphs_of(LAYERS), 200e9, slowdowns)
    usual = Setting(LAYERS, given, 4, 8, TOKENS, Link(50e9, 10e-6))
    return replace(usual, **changes)


def seconds(of: Setting) -> dict[str, float]:
    return {name: one.run.seconds for name, one in compare(of).compared.items()}


def test_without_overlap_two_strands_gain_nothing() -> None:
    """In an order that overlaps nothing all visits take the time of their operators. Then the
    fold waits for bubbles as 1F1B does, and schedules with smaller bubbles are faster."""
    plain = {"sequential": BUILDERS["sequential"]}
    found = compare(setting(builders=plain, link=Link())).compared
    work = {
        name: sum(use.compute + use.exposed for use in one.run.stages)
        for name, one in found.items()
    }
    for name in ("interleaved-1f1b", "fold"):
        assert work[name] == pytest.approx(work["1f1b"], rel=0.001)
    compute = [sum(use.compute for use in one.run.stages) for one in found.values()]
    assert compute == pytest.approx([compute[0]] * len(NAMES))
    steps = {name: one.run.seconds for name, one in found.items()}
    assert steps["fold"] > steps["interleaved-1f1b"] > steps["dualpipe-v"] > steps["zb-v"]


def test_two_strands_hide_communication_in_both_schedules_that_have_them() -> None:
    exposed = {
        name: sum(one.run.share("exposed"))
        for name, one in compare(setting(micro_batches=24)).compared.items()
    }
    assert list(exposed) == NAMES
    assert max(exposed["fold"], exposed["dualpipe-v"]) < min(
        exposed["1f1b"], exposed["interleaved-1f1b"], exposed["zb-v"]
    )


def test_a_visit_of_two_strands_costs_the_same_in_either_schedule() -> None:
    times: dict[str, set[float]] = {}
    for name in ("dualpipe-v", "fold"):
        stage = compare(setting()).compared[name].run.stages[1]
        lasting = [one.end - one.start for one in stage.intervals if len(one.works) == 2]
        times[name] = {round(seconds, 9) for seconds in lasting}
    assert times["fold"] == times["dualpipe-v"]


def test_memory_is_balanced_where_chunks_are_folded() -> None:
    peaks = {
        name: [use.peak for use in one.run.stages]
        for name, one in compare(setting()).compared.items()
    }
    assert max(peaks["fold"]) / min(peaks["fold"]) < 1.05
    assert max(peaks["1f1b"]) / min(peaks["1f1b"]) > 2
    # Gradients that wait for the weight gradients are kept as well.
    assert max(peaks["zb-v"]) > max(peaks["dualpipe-v"]) >= max(peaks["fold"])


def test_a_slow_link_costs_every_schedule() -> None:
    fast = seconds(setting(link=Link()))
    slow = seconds(setting(link=Link(5e9, 50e-6)))
    assert all(fast[name] < slow[name] for name in NAMES)
    # Twice as many chunks send twice as often.
    assert slow["interleaved-1f1b"] - fast["interleaved-1f1b"] > slow["1f1b"] - fast["1f1b"]
    shares = compare(setting(link=Link(5e9, 50e-6))).compared["fold"].run.share("transfer")
    assert min(shares) > 0


def test_searched_orders_are_used_where_they_are_faster() -> None:
    known = setting(slowdowns=True)
    layers = model(3)
    searched = solve(layers, known.costs, budget=Budget(300, 60)).builder()
    offered = replace(known, builders={**BUILDERS, "searched": searched})
    with_search, without = compare(offered).compared, compare(known).compared
    assert "searched" in with_search["fold"].orders[2]
    for name in ("dualpipe-v", "fold"):
        assert with_search[name].run.seconds < without[name].run.seconds
    for name in NAMES:
        assert with_search[name].run.seconds <= without[name].run.seconds * 1.01


def test_what_is_not_defined_is_left_out_with_the_reason() -> None:
    found = compare(setting(micro_batches=6, rounds=7))
    assert list(found.compared) == ["1f1b", "zb-v", "dualpipe-v", "fold"]
    assert "28 chunks need as many layers, and there are 26" in found.refused["interleaved-1f1b"]
    with pytest.raises(ValueError, match="27 chunks need as many layers"):
        compare(setting(stages=27))


def test_the_table_names_what_every_stage_does() -> None:
    found = compare(setting())
    lines = comparison_table(found).splitlines()
    assert lines[0].split() == [
        *("schedule", "step", "speed", "compute", "exposed", "transfer", "bubble", "peak", "memory")
    ]
    assert [line.split("  ")[0] for line in lines[2:7]] == NAMES
    bubble = next(i for i, line in enumerate(lines) if line.startswith("bubble of stage"))
    shown = [float(text.rstrip("%")) for text in lines[bubble + 6].split()[1:]]
    expected = [100 * share for share in found.compared["fold"].run.share("bubble")]
    assert shown == pytest.approx(expected, abs=0.051)
