"""What `dhellam bench kernels` is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench kernels`."""

    kernels: tuple[str, ...] | None = None
    """Names of the kernels to measure; all of them if left out."""

    tokens: tuple[int, ...] = (8192, 32768)
    """Rows of the tensors."""

    hidden: tuple[int, ...] = (4096, 8192)
    """Model widths."""

    vocabulary: tuple[int, ...] = (32000, 128256)
    """Columns of the logits."""

    compiled: bool = True
    """Whether torch.compile is timed as well."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal."""

    budget: float = 900.0
    """Seconds for everything."""
