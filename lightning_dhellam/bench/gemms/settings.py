"""What `dhellam bench gemms` is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench gemms`."""

    preset: str = "llama-3-8b"
    """The model whose layers give the shapes."""

    tokens: int = 8192
    """Tokens of a micro-batch."""

    vocabulary: tuple[int, ...] = (32000, 128256)
    """Vocabularies of the output layers to measure."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal."""

    budget: float = 300.0
    """Seconds for everything."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"--tokens {self.tokens} must be at least 1")
