"""Writes the operators of one graph, with nominal costs and slot sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter

from lightning_dhellam.layers.rules import ALIKE, bound, gathers, of_batch, of_stream, scatters
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.gradients import taken_first
from lightning_dhellam.plan import Collective, Graph, Lane, Operator, Strand, nominal
from lightning_dhellam.plan.layout import Held, Rule


@dataclass(frozen=True)
class Sizes:
    """What sizes of slots and costs of operators follow from.

    Attributes:
        context: groups and sizes of this rank.
        dtype: of activations.
        hidden: channels of the residual stream.
        length: tokens of a sequence, for costs that grow with it; see `Graph.at`.
    """

    context: ParallelContext
    dtype: torch.dtype
    hidden: int
    length: int

    @property
    def tp(self) -> int:
        """Ranks that share a layer."""
        return self.context.topology.tp_size

    def wide(self, channels: int) -> float:
        """Bytes per token of a slot that holds every token of the micro-batch."""
        return channels * self.dtype.itemsize

    @property
    def whole(self) -> float:
        """Bytes per token of hidden states of every token."""
        return self.wide(self.hidden)

    @property
    def shard(self) -> float:
        """Bytes per token of hidden states split along the sequence (sequence parallelism)."""
        return self.whole / self.tp

    @property
    def statistic(self) -> float:
        """Bytes per token of one fp32 number per token, split along the sequence."""
        return 4 / self.tp


@dataclass
class GraphWriter:
    """Collects operators in default order and makes the frozen graph."""

    name: str
    direction: Strand
    sizes: Sizes
    operators: list[Operator] = field(default_factory=list)
    bytes_per_token: dict[str, float] = field(default_factory=dict)
    preparation: list[Operator] = field(default_factory=list)
    step_bytes: dict[str, int] = field(default_factory=dict)

    def once(
        self,
        name: str,
        writes: Mapping[str, int],
        run: Callable[..., Any],
        *,
        cost: float,
        fp8: str = "",
    ) -> None:
        """Add an operator that runs once a step, before the first micro-batch.

        Args:
            name: unique in the graph.
            writes: slots of the step (`STEP_PREFIX`), in the order of `run`'s results, with their
                bytes.
            run: launches it. Takes nothing.
            cost: bytes that it reads and writes.
            fp8: the format of 8 bits that it casts to.
        """
        moves = cost / nominal.MEMORY
        self.preparation.append(
            Operator(name, Lane.COMPUTE, (), tuple(writes), run, moves, light=True, fp8=fp8)
        )
        self.step_bytes.update(writes)

    def compute(
        self,
        name: str,
        reads: tuple[str, ...],
        writes: Mapping[str, float],
        run: Callable[..., Any],
        *,
        flops: float = 0.0,
        moved: float = 0.0,
        growing: float = 0.0,
        accumulates: tuple[Parameter, ...] = (),
        shrinks: bool = False,
        varies: bool = False,
        rehearsals: tuple[Callable[..., Any], ...] = (),
        takes: tuple[tuple[str, str], ...] = (),
        records: tuple[str, ...] = (),
        rule: Rule = ALIKE,
        remakes: tuple[Operator, ...] = (),
        fp8: str = "",
    ) -> None:
        """Add a compute operator. One of no floating-point operations is light.

        Args:
            name: unique in the graph.
            reads: slots in the order of `run`'s arguments.
            writes: slots in the order of `run`'s results, with their bytes per token.
            run: launches it.
            flops: floating-point operations per token, for the nominal cost.
            moved: bytes read and written per token, for the nominal cost.
            growing: floating-point operations per token for each token of the sequence, in place of
                `flops` and `moved`.
            accumulates: parameters whose gradient it adds to; frozen ones are left out.
            shrinks: whether it can leave processors to communication.
            varies: whether its time depends on what values say.
            rehearsals: what is run in its place when a stage rehearses.
            takes: slots written in place, and those read whose memory they take over.
            records: slots written that hold a graph of autograd.
            rule: how slots lie that it reads and writes, on communicators of several ranks.
            remakes: operators that make some of `writes` again from others of them.
            fp8: the format of 8 bits that it multiplies in or casts to.
        """
        assert not (growing and (flops or moved)), f"{name} has two nominal costs"
        growth = growing / nominal.FLOPS
        cost = growth * self.sizes.length or max(flops / nominal.FLOPS, moved / nominal.MEMORY)
        trained = tuple(p for p in accumulates if p.requires_grad)
        slots = tuple(writes)
        self._add(
            Operator(
                name,
                Lane.COMPUTE,
                reads,
                slots,
                run,
                cost,
                trained,
                shrinks=shrinks,
                rule=bound(rule, self.sizes.context, trained),
                growth=growth,
                varies=varies,
                rehearsals=rehearsals,
                light=not (flops or growing),
                remakes=remakes,
                takes=takes,
                records=records,
                fp8=fp8,
            )
        )
        self.bytes_per_token.update(writes)

    def gather(self, name: str, read: str, write: str, channels: int, lane: Lane = Lane.TP) -> str:
        """Gather `read` over the ranks of `lane`, along its first dimension: the sequence.

        Returns the slot to read then. Where there is one rank nothing is to be gathered: no
        operator is added, and `read` is returned.
        """
        ranks = self.sizes.context.topology.size(lane)
        if ranks == 1:
            return read
        size = self.sizes.wide(channels)
        self.collective(
            lane,
            name,
            (read,),
            {write: size},
            collectives.all_gather,
            Collective.ALL_GATHER,
            gathers(lane, Held.SEQUENCE),
            crossing=size - size / ranks,
            light=lane is Lane.TP,
        )
        return write

    def scatter(self, name: str, read: str, write: str, channels: int, lane: Lane = Lane.TP) -> str:
        """Sum `read` over the ranks of `lane`, and keep this rank's part of the sequence.

        Returns the slot to read then, which is `read` where there is one rank.
        """
        ranks = self.sizes.context.topology.size(lane)
        if ranks == 1:
            return read
        whole = self.sizes.wide(channels)
        self.collective(
            lane,
            name,
            (read,),
            {write: whole / ranks},
            collectives.reduce_scatter,
            Collective.REDUCE_SCATTER,
            scatters(lane, Held.SEQUENCE),
            crossing=whole - whole / ranks,
        )
        return write

    def collective(
        self,
        lane: Lane,
        name: str,
        reads: tuple[str, ...],
        writes: Mapping[str, float],
        launch: Callable[..., collectives.Pending],
        collective: Collective,
        rule: Rule,
        *,
        crossing: float,
        varies: bool = False,
        light: bool = False,
    ) -> None:
        """Add a collective of a communication lane.

        Args:
            lane: whose ranks take part.
            name: unique in the graph.
            reads: slots in the order of `launch`'s arguments after the first.
            writes: slots in the order of `launch`'s results, with their bytes per token.
            launch: starts it. Takes the `Communicator` of `lane` and the values of `reads`.
            collective: what it does.
            rule: how slots lie that it reads and writes.
            crossing: bytes per token that this rank receives over its link, for the nominal cost.
            varies: whether its time depends on what values say.
            light: whether it is worth doing again, in place of keeping what it brings.
        """
        communicator = self.sizes.context.communicators[lane]

        def run(*values: torch.Tensor) -> collectives.Pending:
            return launch(communicator, *values)

        cost = crossing / nominal.LINK
        self._add(
            Operator(
                name,
                lane,
                reads,
                tuple(writes),
                run,
                cost,
                collective=collective,
                rule=bound(rule, self.sizes.context),
                varies=varies,
                light=light,
            )
        )
        self.bytes_per_token.update(writes)

    def host(
        self,
        name: str,
        reads: tuple[str, ...],
        writes: Mapping[str, float],
        run: Callable[..., Any],
        *,
        waits: bool = False,
        rule: Rule = ALIKE,
    ) -> None:
        """Add an operator of the lane `host`: a copy to the host, or the wait for one.

        Args:
            name: unique in the graph.
            reads: slots in the order of `run`'s arguments.
            writes: slots in the order of `run`'s results, with their bytes per token on the device.
            run: launches it.
            waits: whether `run` looks at what it reads, for which the host waits.
            rule: how slots lie that it reads and writes.
        """
        rule = bound(rule, self.sizes.context)
        slots = tuple(writes)
        self._add(Operator(name, Lane.HOST, reads, slots, run, rule=rule, waits=waits))
        self.bytes_per_token.update(writes)

    def graph(self, inputs: Mapping[str, float], outputs: tuple[str, ...]) -> Graph:
        """The frozen graph. `inputs`, of hidden states, are handed over; with bytes per token.

        Raises:
            LayoutError: an operator of forward reads what lies otherwise than it needs.
        """
        sizes = {**inputs, **self.bytes_per_token}
        operators = tuple(self.operators)
        context = self.sizes.context
        layouts = of_batch(context) | dict.fromkeys(inputs, of_stream(context))
        return Graph(
            self.name,
            self.direction,
            operators,
            tuple(inputs),
            outputs,
            sizes,
            layouts=layouts,
            preparation=tuple(self.preparation),
            step_bytes=self.step_bytes,
        )

    def _add(self, operator: Operator) -> None:
        self.operators.append(operator)


def main_grad(parameter: Parameter) -> torch.Tensor:
    """Megatron's gradient buffer of `parameter`, to which operators add in place.

    It is cleared when this step has not added to it before. A frozen parameter has none.
    """
    grad: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    if taken_first(parameter):
        grad.zero_()
    return grad
