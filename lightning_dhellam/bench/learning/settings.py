"""What `dhellam bench learning` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dhellam.layers.fp8_formats import FORMATS
from lightning_dhellam.models import ModelConfig, preset

BF16 = "bf16"
PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    BF16: {"precision": "bf16-mixed"},
    **{name: {"precision": "bf16-mixed", "fp8": name} for name in FORMATS},
    "fp16": {"precision": "16-mixed"},
}
"""What a `Runner` is told, by the names of the sides."""


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench learning`."""

    precisions: tuple[str, ...] = tuple(PRECISIONS)
    """What learns: bf16, current and blockwise (linear layers in 8 bits), fp16."""

    steps: int = 2000
    """Optimizer steps of each."""

    layers: int = 12
    """Layers of the Llama that learns. With what follows it has 175 M parameters."""

    hidden_size: int = 1024
    """Channels of its hidden states, in heads of 64, two to each pair of keys and values."""

    ffn_hidden_size: int = 2816
    """Channels of its MLPs."""

    vocab_size: int = 16384
    """Tokens of the tokenizer that is trained on the text."""

    sequence_length: int = 1024
    """Tokens of a sample."""

    batch_size: int = 16
    """Samples of a step."""

    micro_batch_size: int = 8
    """Samples that go through the layers together."""

    learning_rate: float = 6e-4
    """The highest; after a linear warm-up it goes down to a tenth as a cosine does."""

    warmup_steps: int = 100
    """Steps of the warm-up."""

    evaluate_every: int = 200
    """Steps between two validation losses."""

    save_every: int = 500
    """Steps after which a state is written from which the same command goes on; 0 for never but at
    the end of the budget."""

    packages: tuple[str, ...] = ("transformers", "sympy")
    """Whose source is learned beside that of Python's standard library; none with []."""

    seed: int = 1234
    """Of weights and of the order of samples."""

    kernels: dict[str, str] | None = None
    """Backends to use by operator; on a CPU those of 8 bits are emulated."""

    device: str = "cuda"
    """cuda, or cpu for a rehearsal."""

    budget: float = 570.0
    """Seconds for everything; what is not done by then is left for the same command."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown:
            raise ValueError(
                f"--precisions: '{unknown[0]}' is not one: use {', '.join(PRECISIONS)}"
            )
        for name in ("steps", "batch_size", "micro_batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % 128:
            raise ValueError(f"--hidden_size={self.hidden_size} must be a multiple of 128")

    @property
    def config(self) -> ModelConfig:
        """The model that learns."""
        heads = self.hidden_size // 64
        return preset(
            "llama-tiny",
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=heads // 2,
            vocab_size=self.vocab_size,
            max_sequence_length=self.sequence_length,
        )

    @property
    def lesson(self) -> dict[str, Any]:
        """What decides what is learned, in which precision ever: of curves that go together."""
        others = ("precisions", "save_every", "budget")
        found = {name: value for name, value in asdict(self).items() if name not in others}
        return {**found, "packages": list(self.packages)}
