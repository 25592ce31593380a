"""The way for keys and values is the faster one of those for which there is memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.autosearch import exchanges

SEQUENTIAL = {"ring": 100.0, "all_gather": 150.0}
"""Bytes of the sequential plan, by the way."""
LEAST = {"ring": 100.0, "all_gather": 120.0}
"""Bytes of the plan that needs fewest."""
SECONDS = {"ring": 2.0, "all_gather": 1.0}


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose layers are the name of the way, as solver and simulator know it here."""
    runner = SimpleNamespace(context=SimpleNamespace(world_group=None), engine=SimpleNamespace())
    runner.agreed = SimpleNamespace(
        exchanges=("ring", "all_gather"),
        exchange=lambda name: setattr(runner.engine, "layers", name),
    )

    def solve(layers: str, costs: Any, *, memory_limit: float, **_: Any) -> Any:
        if LEAST[layers] > memory_limit:
            raise ValueError(f"memory_limit={memory_limit:.0f} bytes")
        return SimpleNamespace(builder=lambda: None)

    monkeypatch.setattr(exchanges, "solve", solve)
    monkeypatch.setattr(exchanges, "peak_bytes", lambda layers, *_, **__: SEQUENTIAL[layers])
    monkeypatch.setattr(
        exchanges, "simulate", lambda layers, *_, **__: SimpleNamespace(seconds=SECONDS[layers])
    )
    monkeypatch.setattr(exchanges, "Costs", SimpleNamespace(of=lambda profile: None))
    return runner


def take(runner: Any, ending: Any = nullcontext, **memory: float | None) -> tuple[Any, list[str]]:
    """What is taken, and the ways in the order in which they were profiled."""
    profiled: list[str] = []

    def profile() -> Any:
        profiled.append(runner.engine.layers)
        return profiled[-1]

    given = {"memory_limit": None, "memory_slack": None, **memory}
    return exchanges.take_fastest(
        runner,
        [],
        profile,
        tokens=1,
        ending=ending,
        **given,  # type: ignore[arg-type]
    ), profiled


@pytest.mark.parametrize(
    ("memory", "expected", "limit"),
    [
        ({"memory_slack": 30.0}, "all_gather", 130.0),
        # By its own sequential plan it would fit.
        ({"memory_slack": 10.0}, "ring", 110.0),
        ({"memory_limit": 119.0}, "ring", 119.0),
        ({"memory_limit": 120.0}, "all_gather", 120.0),
    ],
)
def test_a_way_that_does_not_fit_is_not_taken(
    runner: Any, memory: dict[str, float], expected: str, limit: float
) -> None:
    taken, profiled = take(runner, **memory)
    assert taken == (expected, expected, limit) and runner.engine.layers == expected
    assert profiled == ["ring", "all_gather"], "each way is profiled once"


def test_no_way_that_fits_is_refused(runner: Any) -> None:
    with pytest.raises(ValueError, match="memory_limit=99 bytes"):
        take(runner, memory_limit=99.0)


def test_who_is_told_to_end_ends_in_the_middle_of_the_choice(runner: Any) -> None:
    def ending() -> AbstractContextManager[None]:
        @contextmanager
        def told() -> Iterator[None]:
            raise SIGTERMException
            yield

        return told()

    with pytest.raises(SIGTERMException):
        take(runner, ending, memory_slack=30.0)
