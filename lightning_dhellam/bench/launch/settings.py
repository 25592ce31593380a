"""What `dhellam bench launch` is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench launch`."""

    plans: tuple[str, ...] = ("sequential", "interleaved")
    """Built-in plans to run."""

    repeats: int = 10
    """Steps; the median counts."""

    device: str | None = None
    """cuda or cpu; left out, cuda if there is a GPU."""

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats {self.repeats} must be at least 1")
