"""The table of `dhellam bench launch`: a row for each plan."""

from __future__ import annotations

from lightning_dhellam.bench.report import Row

COLUMNS = ("plan", "operators", "engine us", "launch us")


def row_of(plan: str, operators: int, engine: float, launch: float) -> Row:
    """The row of one plan.

    Args:
        plan: The plan's name.
        operators: Operators of a step.
        engine: Seconds of the host for a step whose operators do nothing.
        launch: Seconds of the host for a step.
    """
    times = (engine / operators * 1e6, launch / operators * 1e6)
    return dict(zip(COLUMNS, (plan, operators, *times), strict=True))
