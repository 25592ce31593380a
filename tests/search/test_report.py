"""Tables, traces and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from lightning_dhellam.plan import BUILDERS, Lane
from lightning_dhellam.search.measure import Profile, Timing
from lightning_dhellam.search.model import simulate
from lightning_dhellam.search.report import (
    Outcome,
    choose,
    pictures,
    save_trace,
    summary,
    time_text,
)
from lightning_dhellam.search.report.pictures import (
    Panel,
    hidden_shares,
    save_exposed,
    save_heat_map,
    save_timeline,
)
from lightning_dhellam.search.solve import steady_state
from tests.search.graphs import FINGERPRINT, costs, graphs_of, model, toy_costs

SEQUENTIAL = Outcome("sequential", 0.42, {Lane.TP: 0.1}, 0.4, 0.004)
MEGATRON = Outcome("megatron", 0.38, {Lane.TP: 0.06}, 0.36, 0.004)
AUTO = Outcome("auto", 0.33, {Lane.TP: 0.01}, 0.32, 0.004)
PAIRS = Outcome("pairs", 0.30, {Lane.TP: 0.05})


def test_the_fastest_measured_plan_wins() -> None:
    assert choose([SEQUENTIAL, PAIRS, MEGATRON, AUTO]) == (AUTO, "the fastest")


def test_within_noise_the_sequential_plan_stays() -> None:
    close = Outcome("auto", 0.3, {}, 0.395, 0.004)
    winner, reason = choose([SEQUENTIAL, close])
    assert winner is SEQUENTIAL
    assert reason == "'auto' beats it by 5.000 ms only, within the noise of 8.000 ms"


def test_without_measurements_predictions_count() -> None:
    assert choose([PAIRS, Outcome("auto", 0.31, {})])[0] is PAIRS


def test_the_summary_table() -> None:
    assert summary([SEQUENTIAL, PAIRS, MEGATRON, AUTO], "auto").splitlines() == [
        "  plan        predicted         measured  error  exposed (predicted)",
        "  ------------------------------------------------------------------",
        "  pairs       300.00 ms                -      -          tp 50.00 ms",
        "* auto        330.00 ms  320.00 ms ±1.2%  +3.1%          tp 10.00 ms",
        "  megatron    380.00 ms  360.00 ms ±1.1%  +5.6%          tp 60.00 ms",
        "  sequential  420.00 ms  400.00 ms ±1.0%  +5.0%         tp 100.00 ms",
        "* installed: 'auto', the fastest",
        "  speed-up: 1.25× over sequential, 1.12× over megatron",
    ]


def test_speed_up_over_what_was_only_predicted_compares_predictions() -> None:
    megatron = Outcome("megatron", 0.396, {})
    assert "1.20× over megatron (predicted)" in summary([megatron, AUTO], "auto")


def test_a_speed_up_within_the_noise_says_so() -> None:
    close = replace(MEGATRON, measured=0.327)
    assert summary([SEQUENTIAL, close, AUTO], "auto").splitlines()[-1] == (
        "  speed-up: 1.25× over sequential, 1.02× over megatron (within the noise)"
    )
    once = [replace(outcome, spread=0.0) for outcome in (SEQUENTIAL, AUTO)]
    assert summary(once, "auto").endswith("sequential (measured once: its noise is not known)")
    slower = replace(MEGATRON, measured=0.315)
    assert summary([slower, AUTO], "auto").endswith("0.98× over megatron (within the noise)")


def test_times_in_the_unit_that_reads_best() -> None:
    assert [time_text(s) for s in (2.0, 8.77e-3, 42e-6)] == ["2.00 s", "8.77 ms", "42 µs"]


def test_a_trace_holds_every_operator_of_every_timeline(tmp_path: Path) -> None:
    toy, given = toy_costs({})
    step = simulate([toy], BUILDERS["interleaved"], given, micro_batches=2)
    save_trace(tmp_path / "trace.json", {"predicted": step.intervals, "measured": step.intervals})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    assert len(bars) == 2 * len(step.intervals) == 2 * 2 * 10
    names = {(e["pid"], e["args"]["name"]) for e in events if e["ph"] == "M"}
    assert names == {(pid, name) for pid in (1, 2) for name in ("compute", "tp")} | {
        (1, "predicted"),
        (2, "measured"),
    }
    gather = next(event for event in bars if event["name"] == "forward/gather")
    assert (gather["ts"], gather["dur"]) == pytest.approx((1e6, 1e6))


def test_hidden_shares_of_a_profile() -> None:
    rows = [
        Timing("gather", None, 2.0, 2.0, 2.0),
        Timing("gemm", None, 4.0, 4.0, 4.0),
        Timing("norm", None, 1.0, 1.0, 1.0),
        Timing("gather", "gemm", 3.0, 3.0, 3.0),
        Timing("gemm", "gather", 4.5, 4.5, 4.5),
    ]
    lanes = {"gather": Lane.TP, "gemm": Lane.COMPUTE, "norm": Lane.COMPUTE}
    found = hidden_shares(Profile(FINGERPRINT, {}, lanes, tuple(rows)))
    assert found[:2] == (["gather"], ["gemm", "norm"])
    # Started together they take 4.5 instead of 6: 1.5 of 2 are hidden.
    np.testing.assert_allclose(found[2], [[0.75, np.nan]])


def test_pictures_are_drawn(tmp_path: Path) -> None:
    layers = model(1)
    given = costs(graphs_of(layers), 110e9)
    layer = layers[1]
    plan = BUILDERS["dhellam"](layer.forward, layer.backward)
    steady = steady_state(layer, layer, plan, given, shown=1)
    save_timeline(tmp_path / "timeline.png", [Panel("dhellam", steady.intervals, [steady.period])])
    exposed, steps = {"dhellam": steady.exposed}, {"dhellam": steady.period}
    save_exposed(tmp_path / "exposed.png", exposed, steps, {"dhellam": 1.2 * steady.period})
    rows = (Timing("a/gather", None, 1.0, 1.0, 1.0), Timing("a/gemm", None, 1.0, 1.0, 1.0))
    lanes = {"a/gather": Lane.TP, "a/gemm": Lane.COMPUTE}
    save_heat_map(tmp_path / "heat.png", Profile(FINGERPRINT, {}, lanes, rows))
    for name in ("timeline", "exposed", "heat"):
        picture = imread(tmp_path / f"{name}.png")
        assert min(picture.shape[:2]) > 200
        assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 20
    # Both strands are on the timeline.
    pixels = (imread(tmp_path / "timeline.png")[..., :3] * 255).round().astype(int)
    for colour in ((0x2F, 0x6D, 0xB3), (0xE0, 0x8A, 0x2C)):
        assert (pixels == colour).all(axis=2).mean() > 0.02


def test_the_picture_of_exposed_communication_says_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: drawn.append(figure))
    exposed = {"auto": {Lane.TP: 1e-3}, "pairs": {Lane.TP: 2e-3}}
    save_exposed(tmp_path / "x.png", exposed, {"auto": 4e-3, "pairs": 5e-3}, {"auto": 4.5e-3})
    (axis,) = drawn[0].axes
    assert "bars are predicted" in axis.get_xlabel()
    texts = [text.get_text() for text in axis.texts]
    assert texts == [
        "predicted 4.0 ms, 25% exposed; measured 4.5 ms",
        "predicted 5.0 ms, 40% exposed",
    ]
    (legend,) = drawn[0].legends
    assert "end of a measured step" in [text.get_text() for text in legend.get_texts()]


def test_a_steady_state_adds_up() -> None:
    layers = model(1)
    given = costs(graphs_of(layers), 110e9, True)
    layer = layers[1]
    steady = steady_state(
        layer, layer, BUILDERS["interleaved"](layer.forward, layer.backward), given, shown=3
    )
    compute = [i for i in steady.intervals if i.lane is Lane.COMPUTE]
    busy = sum(i.end - i.start for i in compute)
    alone = sum(
        given.alone(g, o.name)
        for g in (layer.forward, layer.backward)
        for o in g.operators
        if not o.is_communication
    )
    assert busy >= 3 * alone * (1 - 1e-9)
    assert max(i.end for i in steady.intervals) <= 3 * steady.period * (1 + 1e-9)
    assert 0 < steady.exposed[Lane.TP] < steady.period
