"""The reduction of gradients as an operator that can be timed, and what a step has of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.engine import Engine
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.plan import Graph, Lane, Operator, Strand
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Reductions


class Reduction(NamedTuple):
    """The reduction of a bucket of gradients, which Megatron-core starts outside of any plan.

    Attributes:
        graph: graph of that operator alone.
        buffers: gradients of a step.
    """

    graph: Graph
    buffers: GradientBuffers

    @classmethod
    def of(cls, buffers: GradientBuffers) -> Reduction | None:
        """Return the reduction of the largest bucket, None where there are no replicas."""
        if not buffers.are_reduced:
            return None
        # A profile knows buckets of this size alone.
        reads = (f"gradients.{buffers.largest_bucket.nbytes}.{buffers.collective}",)
        operator = Operator(
            "reduce", Lane.DP, reads, (), buffers.reduce, collective=buffers.collective
        )
        return cls(Graph("gradients", Strand.BACKWARD, (operator,), reads, ()), buffers)

    def captured(self) -> dict[tuple[str, str], list[Tensor]]:
        """Return what the operator reads, as `Engine.capture` does: a bucket of gradients of 0."""
        bucket = torch.zeros_like(self.buffers.largest_bucket)
        return {(self.graph.fingerprint, "reduce"): [bucket]}

    def of_step(self, engine: Engine, profile: Profile) -> Reductions | None:
        """Return what a step reduces; None if `profile` does not know how long that takes."""
        key = profile.operators.get(self.graph.fingerprint, {}).get("reduce")
        if key is None:
            return None
        sizes = [0.0] * len(engine.layers)
        seen: set[int] = set()
        # What layers share is complete with the first of them.
        for layer, pair in enumerate(engine.layers):
            for operator in pair.backward.operators:
                for parameter in operator.accumulates:
                    reduced = parameter.requires_grad and self.buffers.is_reduced(parameter)
                    if reduced and id(parameter) not in seen:
                        seen.add(id(parameter))
                        sizes[layer] += parameter.main_grad.nbytes
        return Reductions(key, float(self.buffers.largest_bucket.nbytes), tuple(sizes))
