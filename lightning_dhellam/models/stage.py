"""Which layers of a model a pipeline stage builds, and what stands for the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from torch import Tensor, nn

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.counts import costs_in_layers
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.pipeline.split import balanced, check_split, chunks
from lightning_dhellam.plan.placement import Placement


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
    config: ModelConfig, placement: Placement, given: Iterable[int] | None = None
) -> tuple[int, ...]:
    """Layers of each chunk of a placement: as given, or balanced by cost.

    Raises:
        ValueError: the split that was given does not fit, or the layers are too few.
    """
    if given:
        return check_split(tuple(given), config.num_layers, placement)
    embedding, head = costs_in_layers(config)
    return balanced(config.num_layers, placement, embedding=embedding, head=head)


def chunks_of_layers(config: ModelConfig, context: ParallelContext) -> list[int]:
    """The chunk of each layer of the model."""
    split = pipeline_split(config, context.placement, context.pipeline_split)
    return [chunk for chunk, layers in enumerate(chunks(split)) for _ in layers]


def check_order(layers: Iterable[nn.Module], stages: int) -> None:
    """Refuse layers that would have to move to another stage, or be on several.

    Every rank finds the same: what is built on another stage has something that stands for it.

    Raises:
        ValueError: with the number of the layer.
    """
    found: dict[int, int] = {}
    last = 0
    for index, layer in enumerate(layers):
        first = found.setdefault(id(layer), index)
        if first != index:
            raise ValueError(
                f"model.layers[{index}] is model.layers[{first}] once more, which a pipeline of"
                f" pipeline_parallel_size={stages} stages cannot share: put in a module of its own,"
                " or leave pipeline_parallel_size at 1"
            )
        chunk = getattr(layer, "pipeline_chunk", last)
        if chunk < last:
            raise ValueError(
                f"model.layers[{index}] was built for chunk {chunk} of the pipeline, but is behind"
                f" a layer of chunk {last}: with pipeline_parallel_size={stages} a layer cannot"
                " change its stage; exchange layers of one chunk only, or give them other weights"
                " instead of another place"
            )
        last = chunk


def is_here(chunk: int, context: ParallelContext) -> bool:
    """Whether this rank's stage holds a chunk."""
    return context.placement.stage_of[chunk] == context.topology.pp_rank
