"""What `dhellam bench convert` is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench convert`."""

    preset: str = "llama-3.2-3b"
    """The model whose folder is written and read."""

    layers: int = 16
    """Its layers: with those of the default it has 2.0 billion parameters."""

    dtype: str = "bfloat16"
    """Of the weights, in memory and in the files."""

    rounds: int = 5
    """Each way once in each of so many rounds; the medians count."""

    def __post_init__(self) -> None:
        for name in ("layers", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"--dtype {self.dtype}: use bfloat16, float16 or float32")
