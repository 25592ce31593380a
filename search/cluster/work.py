"""What a step does, whatever a machine makes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from lightning_dhellam.pipeline.schedules import Placement, Schedule, Scheme, fold, placed, verify
from lightning_dhellam.plan import GraphPair

THIN = 2, 4
"""Layers of a chunk that are played where a step is only sketched: each further one takes as long
as those that the second has more than the first."""


@dataclass(frozen=True)
class Weights:
    """What a layer trains on a rank.

    Attributes:
        dense: parameters that all replicas of a stage hold.
        experts: parameters of experts, which fewer ranks hold.
    """

    dense: float = 0.0
    experts: float = 0.0

    @property
    def total(self) -> float:
        """All that it trains."""
        return self.dense + self.experts


@dataclass(frozen=True)
class Work:
    """What a step does, whatever a machine makes of it.

    Attributes:
        layers: of the whole model on a rank's share of each: embedding, layers, head.
        weights: what each of them trains.
        split: layers of each chunk of the pipeline, without embedding and head.
        stages: of the pipeline.
        micro_batches: of a step.
        tokens: of a micro-batch on a rank.
        sharded: whether the optimizer's state is spread over replicas.
        bucket: parameters of a bucket of gradients.
        gradient_bytes: of each parameter.
        scheme: makes the pipeline's schedule.
    """

    layers: Sequence[GraphPair]
    weights: Sequence[Weights]
    split: tuple[int, ...]
    stages: int
    micro_batches: int
    tokens: int
    sharded: bool = True
    bucket: float = 40e6
    gradient_bytes: float = 4.0
    scheme: Scheme = fold

    @cached_property
    def schedule(self) -> Schedule:
        """The order of the pipeline's works. Raises ScheduleError for numbers that it has not."""
        return _schedule(self.scheme, self.stages, self.micro_batches)

    def verify(self) -> None:
        """Prove that the schedule can be carried out; see `pipeline.schedules.verify`."""
        _verify(self.scheme, self.stages, self.micro_batches)

    @cached_property
    def placement(self) -> Placement:
        """Which stage holds which chunk."""
        return placed(self.scheme, self.stages)

    @cached_property
    def chunks(self) -> list[range]:
        """Numbers of the layers of each chunk, embedding and head included."""
        counts = list(self.split)
        counts[0] += 1
        counts[-1] += 1
        return [range(*ends) for ends in pairwise(accumulate(counts, initial=0))]

    @cached_property
    def distinct(self) -> Mapping[int, GraphPair]:
        """Its layers by their `id`: those of one kind share their graphs, and are one here."""
        return {id(pair): pair for pair in self.layers}

    def of_stage(self, stage: int) -> Iterator[int]:
        """Numbers of the layers of a stage."""
        if self.stages == 1:
            yield from range(len(self.layers))
            return
        for chunk in self.placement.held(stage):
            yield from self.chunks[chunk]

    @property
    def is_deep(self) -> bool:
        """Whether each chunk that has layers has more than a sketch plays, and all are alike."""
        alike = len({layer.backward.fingerprint for layer in self.layers[1:-1]}) == 1
        return alike and min(filter(None, self.split)) > THIN[1]

    def shallow(self, depth: int) -> Work:
        """The same with so many layers in the smallest chunk, and fewer in the others as well."""
        fewer = min(filter(None, self.split)) - depth
        split = tuple(count - fewer if count else 0 for count in self.split)
        kept = [0, *range(1, 1 + sum(split)), len(self.layers) - 1]
        return replace(
            self,
            layers=[self.layers[n] for n in kept],
            weights=[self.weights[n] for n in kept],
            split=split,
        )


@lru_cache(maxsize=1024)
def _schedule(scheme: Scheme, stages: int, micro_batches: int) -> Schedule:
    """Choices of one question have many schedules in common."""
    return scheme(stages, micro_batches)


@lru_cache(maxsize=1024)
def _verify(scheme: Scheme, stages: int, micro_batches: int) -> None:
    verify(_schedule(scheme, stages, micro_batches))
