"""Which layers of a model a pipeline stage builds, and what stands for the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor, nn

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.counts import costs_in_layers
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.pipeline.split import balanced, check_split, chunks, stage_of


class Elsewhere(nn.Module):
    """Stands for a layer that another pipeline stage has, so that layers keep their numbers.

    Args:
        chunk: that the layer is part of.
    """

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.pipeline_chunk = chunk

    def forward(self, hidden: Tensor) -> NoReturn:
        """Refuse to compute: the layer is on another stage."""
        raise RuntimeError("this layer is on another pipeline stage")


def pipeline_split(
    config: ModelConfig, stages: int, given: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Layers of each of the 2P chunks: as given, or balanced by cost.

    Raises:
        ValueError: the split that was given does not fit, or the layers are too few.
    """
    if given:
        return check_split(tuple(given), config.num_layers, stages)
    embedding, head = costs_in_layers(config)
    return balanced(config.num_layers, stages, embedding=embedding, head=head)


def chunks_of_layers(config: ModelConfig, context: ParallelContext) -> list[int]:
    """The chunk of each layer of the model."""
    split = pipeline_split(config, context.topology.pp_size, context.pipeline_split)
    return [chunk for chunk, layers in enumerate(chunks(split)) for _ in layers]


def is_here(chunk: int, context: ParallelContext) -> bool:
    """Whether this rank's stage holds a chunk."""
    topology = context.topology
    return stage_of(chunk, topology.pp_size) == topology.pp_rank
