"""A device that computes without pause lowers its clock, and predictions know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from lightning_dhellam.autosearch.profiling import EngineBench
from lightning_dhellam.engine import Subject
from lightning_dhellam.engine.timing import Sustained
from lightning_dhellam.plan import BUILDERS, Lane
from lightning_dhellam.search.measure import Clock, Profile, measure
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.solve import solve_pair
from tests.search.graphs import FINGERPRINT, FakeBench, costs, graphs_of, transformer

THROTTLED = Clock(1.2, 0.6)
LAYER = transformer()


def _known(link: float, clock: Clock = THROTTLED) -> Costs:
    profile = measure(FakeBench(costs(graphs_of([LAYER]), link)), graphs_of([LAYER]), FINGERPRINT)
    return replace(Costs.of(profile), clock=clock)


def test_a_clock_goes_through_what_was_measured() -> None:
    clock = Clock.through(1.2, (0.75, 1.05))
    assert clock.slowdown(1.0) == pytest.approx(1.2)
    assert clock.slowdown(0.75) == pytest.approx(1.05)
    assert clock.slowdown(0.3) == 1.0
    # Never faster than alone, never slower than without pauses, whatever noise says.
    assert Clock.through(0.98, (0.7, 1.0)) == Clock()
    assert Clock.through(1.1, (1.0, 1.1)) == Clock()
    assert Clock.through(1.1, (0.7, 1.15)).slowdown(0.5) == pytest.approx(1.1)


def test_communication_slows_down_as_compute_does() -> None:
    clock = Clock.through(1.2, (0.75, 1.1), 1.4)
    assert clock.slowdown_of_communication(1.0) == pytest.approx(1.4)
    assert clock.slowdown_of_communication(0.75) == pytest.approx(1.2)
    assert clock.slowdown_of_communication(0.1) == 1.0
    # A link that is faster beside a low clock is noise, and so is one behind a clock that is high.
    assert Clock.through(1.2, (0.75, 1.1), 0.98).slowdown_of_communication(1.0) == 1.0
    assert Clock.through(0.99, (0.75, 1.0), 1.3).slowdown_of_communication(1.0) == 1.0


class _Hot:
    """Times operators on a device that has settled: compute by 1.2 slower, communication by 1.3."""

    on_cuda = True

    def __init__(self, once: dict[str, float], pair: float) -> None:
        self.once, self.pair = once, pair

    def sustained(
        self,
        subjects: Sequence[Subject],
        seconds: float,
        pause: float,
        after: Sequence[tuple[Subject, Subject]] = (),
    ) -> Sustained:
        cool = sum(self.once[subject.operator.name] for subject in subjects)
        longest = max(self.once[subject.operator.name] for subject in subjects)
        assert all(subject.operator.is_communication for subject, _ in after)
        assert {self.once[compute.operator.name] for _, compute in after} <= {longest}
        share = 1 / (1 + pause)
        return Sustained(share, cool * (1.06 if pause else 1.2), 1.3 * self.pair * len(after))


def test_a_profile_asks_a_device_that_has_settled_for_its_clock() -> None:
    graphs = graphs_of([LAYER])
    known = costs(graphs, 60e9)
    profile = measure(FakeBench(known), graphs, FINGERPRINT)
    transfers = [o for graph in graphs for o in graph.operators if o.is_communication]
    once = {o.name: known.alone(graph, o.name) for graph in graphs for o in graph.operators}
    slowest = max(once[o.name] for o in transfers)
    assert slowest == pytest.approx(min(once[o.name] for o in transfers)), "one size of transfer"
    captured = {(graph.fingerprint, o.name): [] for graph in graphs for o in graph.operators}
    clock = EngineBench(cast(Any, _Hot(once, slowest)), captured).clock(profile)
    assert clock == Clock.through(clock.full, (1 / 1.35, 1.06), clock.communication)
    assert clock.full == pytest.approx(1.2)
    assert clock.communication == pytest.approx(1.3)


def test_a_clock_comes_back_from_the_file_of_its_profile(tmp_path: Path) -> None:
    graphs = graphs_of([LAYER])
    profile = measure(FakeBench(costs(graphs, 200e9)), graphs, FINGERPRINT)
    assert profile.clock == Clock()
    clock = replace(THROTTLED, communication=1.3)
    replace(profile, clock=clock).save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json").clock == clock


@pytest.mark.parametrize("plan", BUILDERS)
@pytest.mark.parametrize("link", [60e9, 200e9, 1e15])
def test_a_simulated_step_agrees_with_the_clock_of_its_own_share(plan: str, link: float) -> None:
    known = _known(link)
    step = simulate([LAYER] * 3, BUILDERS[plan], known, micro_batches=3)
    at_ease = simulate([LAYER] * 3, BUILDERS[plan], _known(link, Clock()), micro_batches=3)
    slowdown = THROTTLED.slowdown(step.utilisation[Lane.COMPUTE])
    assert step.busy[Lane.COMPUTE] == pytest.approx(at_ease.busy[Lane.COMPUTE] * slowdown, rel=0.01)
    assert step.busy[Lane.TP] == pytest.approx(at_ease.busy[Lane.TP])


def test_every_operator_takes_as_long_as_its_lane_is_slow() -> None:
    clock = replace(THROTTLED, communication=1.3)
    fast = _known(200e9, clock)
    slow = fast.clocked(0.8)
    for graph in (LAYER.forward, LAYER.backward):
        for operator in graph.operators:
            link = operator.is_communication
            factor = clock.slowdown_of_communication if link else clock.slowdown
            expected = fast.alone(graph, operator.name) * factor(0.8)
            assert slow.alone(graph, operator.name) == pytest.approx(expected)
    assert slow.clock == Clock(), "what is slowed is not slowed again"


def test_the_solver_takes_compute_as_slow_as_it_will_be() -> None:
    fast, slow = _known(1e15), _known(20e9)
    work = sum(
        fast.alone(graph, o.name)
        for graph in (LAYER.forward, LAYER.backward)
        for o in graph.operators
        if not o.is_communication
    )
    found = solve_pair(LAYER, LAYER, fast)
    assert found.bounds[Lane.COMPUTE] == pytest.approx(work * THROTTLED.full)
    # Where the link decides, compute rests.
    assert solve_pair(LAYER, LAYER, slow).bounds[Lane.COMPUTE] == pytest.approx(work)
