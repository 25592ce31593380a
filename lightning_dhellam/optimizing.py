"""What a model is optimized with, by name: weight decay of its kinds of parameters, and schedules.

A factor f of the highest learning rate, of a run of 20 steps with 4 of warm-up:

    cosine      /‾‾\\__      half a wave down to `min_lr_ratio`
    linear      /\\\\\\__      a line down to it
    constant    /‾‾‾‾‾      no end needed
    wsd         /‾‾‾‾\\      warm-up, stable, and a line down to it in the last `decay_steps`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"cosine": _cosine, "linear": _linear, "constant": _constant, "wsd": _linear}
)
"""What is left above `min_lr_ratio` where so much of the way down is done, 0 to 1, by name."""

_DECAY = 0.1
"""Part of the steps in which `wsd` goes down, if it is not told."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate at each step, as a factor of the highest.

    Attributes:
        name: one of `SCHEDULES`.
        warmup_steps: steps of linear warm-up.
        min_lr_ratio: the factor at the end.
        decay_steps: of `wsd`: steps at the end in which it goes down; None for a tenth of all.

    Raises:
        ValueError: there is no such schedule, or a value that it cannot have.
    """

    name: str
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(
                f"schedule='{self.name}' is not known: use one of {', '.join(SCHEDULES)}"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative: give 0 or more")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(
                f"min_lr_ratio={self.min_lr_ratio} must be from 0 to 1: it is a part of the highest"
                " learning rate"
            )
        if self.decay_steps is not None:
            if self.name != "wsd":
                raise ValueError(
                    f"decay_steps={self.decay_steps} is of schedule='wsd', and schedule is"
                    f" '{self.name}': leave decay_steps out"
                )
            if self.decay_steps < 1:
                raise ValueError(f"decay_steps={self.decay_steps} is not positive: give 1 or more")

    def check(self, total: float) -> None:
        """Refuse more steps of warm-up and decay than there are in all.

        Raises:
            ValueError: names them.
        """
        asked = self.warmup_steps + (self.decay_steps or 0)
        if self.decay_steps is not None and asked > total:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and decay_steps={self.decay_steps} are more than"
                f" the {total:.0f} steps of the run: make them fewer, or raise max_steps"
            )

    def factor(self, step: int, total: float) -> float:
        """The factor of a step, counted from 0, of `total`; a run without an end never goes down.

        Step s of W steps of warm-up has (s + 1) / (W + 1).
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if math.isinf(total):
            return 1.0
        first: float = self.warmup_steps
        if self.name == "wsd":
            steps = max(1, round(_DECAY * total)) if self.decay_steps is None else self.decay_steps
            first = max(first, total - steps)
        progress = min(1.0, max(0.0, step - first) / max(1, total - first))
        left = SCHEDULES[self.name](progress)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left


def decay_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True
) -> list[dict[str, Any]]:
    """Groups for an optimizer, in which norms and biases are not decayed, and all else is.

    Args:
        model: whose parameters are grouped, the frozen ones as well.
        weight_decay: of the first group; that of the second is 0.
        decay_embeddings: whether embeddings are decayed, of tokens and of positions; a tied output
            layer is the embedding.
    """
    kept = {id(parameter) for parameter in _not_decayed(model, decay_embeddings)}
    parameters = list(model.parameters())
    return [
        {
            "params": [p for p in parameters if id(p) not in kept],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in parameters if id(p) in kept], "weight_decay": 0.0},
    ]


def _not_decayed(model: nn.Module, decay_embeddings: bool) -> Iterator[nn.Parameter]:
    for name, module in model.named_modules():
        is_embedding = any(word.endswith(("embedding", "embeddings")) for word in name.split("."))
        is_kept = "norm" in type(module).__name__.lower() or (is_embedding and not decay_embeddings)
        for own, parameter in module.named_parameters(recurse=False):
            # Of Megatron's fused layers those of the norm before are called layer_norm_weight.
            if is_kept or parameter.dim() <= 1 or "bias" in own or "norm" in own:
                yield parameter
