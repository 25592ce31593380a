"""What `dhellam bench pipeline` is told, and each of its processes with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dhellam.models import ModelConfig, preset
from lightning_dhellam.pipeline.schedules import AUTO, Placement, playable


@dataclass(frozen=True)
class Settings:
    """The options of `dhellam bench pipeline`."""

    preset: str = "llama-tiny"
    """The model that gives the shape."""

    layers: int = 8
    """Layers of the model: a multiple of the stages."""

    stages: int = 2
    """Stages of the pipeline: processes with one thread each."""

    micro_batches: int = 8
    """Micro-batches of one sequence each to a step."""

    sequence: int = 128
    """Tokens of a sequence."""

    schedules: tuple[str, ...] = ("fold", "zb-v", "dualpipe-v", "auto")
    """Our sides: schedules by name, and `auto` for the one that is chosen on real steps."""

    plan: str = "sequential"
    """The plan of ours."""

    steps: int = 5
    """Steps that are timed; the median counts."""

    def __post_init__(self) -> None:
        stages, layers = self.stages, self.layers
        if stages < 2 or layers % stages or layers < 2 * stages - 2:
            raise ValueError(
                f"--layers {layers} --stages {stages}: Megatron-core's 1F1B needs two stages or"
                " more, and as many layers on each: make --layers a multiple of --stages"
            )
        known = (*playable(Placement.folded(stages)), AUTO)
        for schedule in self.schedules:
            if schedule not in known:
                raise ValueError(
                    f"--schedules: '{schedule}' is not a schedule of folded layers: use"
                    f" {' or '.join(known)}"
                )
        for name in ("micro_batches", "sequence", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")

    @property
    def config(self) -> ModelConfig:
        """The model that all sides train."""
        return preset(self.preset, num_layers=self.layers, tie_embeddings=False)

    def batch(self) -> dict[str, Tensor]:
        """`tokens` and `labels` [B, S] of every step, the same in every process."""
        generator = torch.Generator().manual_seed(5)
        size = (self.micro_batches, self.sequence + 1)
        tokens = torch.randint(self.config.vocab_size, size, generator=generator)
        return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
