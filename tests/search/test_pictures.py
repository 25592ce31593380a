"""Pictures show what they should: areas and colours, not pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_dhellam.pipeline.schedules import fold, one_f_one_b, zero_bubble_v
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.model import Interval
from lightning_dhellam.search.pipeline import UniformCosts, play
from lightning_dhellam.search.report.pictures import COLOURS, Panel, save_timeline
from lightning_dhellam.search.report.pipeline_pictures import LATE, save_pipelines

FORWARD, BACKWARD = COLOURS[Strand.FORWARD], COLOURS[Strand.BACKWARD]


def share(path: Path, colour: str) -> float:
    """Share of the picture that has a colour."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return float((pixels == wanted).all(axis=2).mean())


def extent(path: Path, colour: str) -> tuple[int, int]:
    """First and last column that have a colour."""
    pixels = (imread(path)[..., :3] * 255).round().astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    # The legend is in the first rows.
    columns = np.flatnonzero((pixels[60:] == wanted).all(axis=2).any(axis=0))
    return int(columns[0]), int(columns[-1])


def on(lane: Lane, strand: Strand, start: float, end: float) -> Interval:
    return Interval(lane, strand, "fc1.gemm", 0, 0, start, end)


def test_a_timeline_is_filled_as_far_as_lanes_work(tmp_path: Path) -> None:
    half = [
        on(Lane.COMPUTE, Strand.FORWARD, 0.0, 0.5e-3),
        on(Lane.TP, Strand.BACKWARD, 0.5e-3, 1e-3),
    ]
    more = [*half, on(Lane.COMPUTE, Strand.FORWARD, 0.5e-3, 1e-3)]
    save_timeline(tmp_path / "half.png", [Panel("half", half)])
    save_timeline(tmp_path / "more.png", [Panel("more", more)])
    once, twice = (share(tmp_path / f"{name}.png", FORWARD) for name in ("half", "more"))
    assert 1.7 < twice / once < 2.1
    assert share(tmp_path / "half.png", BACKWARD) == pytest.approx(once, rel=0.1)


def test_panels_share_one_scale(tmp_path: Path) -> None:
    """The panel of a plan twice as fast is half as full."""
    fast = [on(Lane.COMPUTE, Strand.FORWARD, 0.0, 1e-3)]
    slow = [on(Lane.COMPUTE, Strand.BACKWARD, 0.0, 2e-3)]
    save_timeline(tmp_path / "both.png", [Panel("fast", fast), Panel("slow", slow)])
    ratio = share(tmp_path / "both.png", BACKWARD) / share(tmp_path / "both.png", FORWARD)
    assert 1.8 < ratio < 2.2


def test_pipelines_are_drawn_with_every_strand(tmp_path: Path) -> None:
    costs = UniformCosts(1.0, 1.0, 1.0)
    runs = {s.name: play(s, costs) for s in (one_f_one_b(4, 8), fold(4, 8))}
    save_pipelines(tmp_path / "two.png", runs)
    forward, backward = (share(tmp_path / "two.png", c) for c in (FORWARD, BACKWARD))
    assert 1.4 < backward / forward < 2.3
    assert share(tmp_path / "two.png", LATE) == 0.0
    save_pipelines(tmp_path / "three.png", {"ZB-V": play(zero_bubble_v(4, 8), costs)})
    assert share(tmp_path / "three.png", LATE) > 0.05


def test_a_pipeline_begins_forward_and_ends_backward(tmp_path: Path) -> None:
    save_pipelines(tmp_path / "fold.png", {"fold": play(fold(3, 6), UniformCosts())}, unit="visits")
    forward, backward = (extent(tmp_path / "fold.png", colour) for colour in (FORWARD, BACKWARD))
    assert forward[0] < backward[0]
    assert forward[1] < backward[1]


def test_a_pass_of_two_strands_is_split(tmp_path: Path) -> None:
    """The same work takes as much area in either colour, side by side or one above the other."""
    costs = UniformCosts(1.0, 0.5, 0.5)
    save_pipelines(tmp_path / "one.png", {"1F1B": play(one_f_one_b(1, 2), costs)})
    save_pipelines(tmp_path / "two.png", {"fold": play(fold(1, 2), costs)})
    for name in ("one", "two"):
        forward, backward = (share(tmp_path / f"{name}.png", c) for c in (FORWARD, BACKWARD))
        assert forward == pytest.approx(backward, rel=0.15)


def test_a_large_pipeline_is_drawn_without_numbers(tmp_path: Path) -> None:
    played = play(fold(8, 64), UniformCosts())
    save_pipelines(tmp_path / "large.png", {"fold": played})
    assert share(tmp_path / "large.png", BACKWARD) > 0.2
