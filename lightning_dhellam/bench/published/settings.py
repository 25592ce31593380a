"""What `dhellam bench published` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_dhellam.bench.published.cases import CASES, Case
from lightning_dhellam.nearest import suggestion


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench published`."""

    profile: Path | None = None
    """Profile of one rank, such as `dhellam search` saves; without one all operators are derived
    from data sheets."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    """Published bars by name; all where it is left out."""

    evaluations: int = 16_000
    """Orders that the search for the plan of `auto` looks at."""

    def __post_init__(self) -> None:
        known = [case.name for case in CASES]
        for name in self.cases:
            if name not in known:
                raise ValueError(
                    f"--cases: '{name}' is no published bar: use {', '.join(known)}"
                    f"{suggestion(name, known)}"
                )
        if self.evaluations < 1:
            raise ValueError(f"--evaluations {self.evaluations} must be at least 1")

    @property
    def chosen(self) -> list[Case]:
        """The cases, in the order of the tables."""
        return [case for case in CASES if case.name in self.cases]
