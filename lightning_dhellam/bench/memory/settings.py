"""What `dhellam bench memory` is told."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.bench.memory.cases import Case, cases


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench memory`."""

    device: str = "cuda"
    """cuda, or cpu to rehearse in miniature."""

    miniature: bool = False
    """Whether to rehearse in miniature on a GPU."""

    cases: tuple[str, ...] | None = None
    """Names of cases to measure, such as auto; all cases if left out."""

    steps: int = 4
    """Steps of each case: memory that is taken after the second one is growth."""

    parity: bool = True
    """Whether to compare with a step that makes nothing again."""

    budget: float = 1e9
    """Seconds after which no more cases are begun."""

    def __post_init__(self) -> None:
        if self.steps < 3:
            raise ValueError(f"--steps {self.steps} must be at least 3: the first two take memory")
        self.chosen_cases()

    def chosen_cases(self) -> dict[str, Case]:
        """The cases to measure, by name.

        Raises:
            ValueError: There is no such case.
        """
        known = cases(self.miniature or self.device == "cpu")
        for name in self.cases or ():
            if name not in known:
                raise ValueError(f"--cases: '{name}' is not a case: use {', '.join(known)}")
        return {name: known[name] for name in self.cases or known}
