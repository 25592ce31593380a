"""The smallest schedulable unit, and the lane it occupies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

from lightning_dhellam.plan.layout import Rule


class Lane(StrEnum):
    """What an operator occupies while it runs.

    On CUDA a lane is a stream. On CPU `compute` and `host` run inline and every other lane is
    asynchronous work of a process group. On `offload` saved slots go to host memory, and on `fetch`
    they come back (on CPU inline as well): a link to the host carries both ways at once. On `host`
    values come to the host that it must know to go on, such as how many rows an exchange moves.
    """

    COMPUTE = "compute"
    TP = "tp"
    CP = "cp"
    EP = "ep"
    PP = "pp"
    DP = "dp"
    OFFLOAD = "offload"
    FETCH = "fetch"
    HOST = "host"

    @property
    def moves(self) -> bool:
        """Whether bytes move on it beside compute: between ranks, or to the host and back."""
        return self not in (Lane.COMPUTE, Lane.HOST)

    @property
    def copies(self) -> bool:
        """Whether they move between this rank's device and its host, and no rank communicates."""
        return self in (Lane.OFFLOAD, Lane.FETCH)


class Collective(StrEnum):
    """What a communication operator does, on which its time and its processors depend.

    EXCHANGE sends to one neighbour and receives from another, as a ring needs. SEND and RECEIVE are
    the two ends of a transfer between pipeline stages.
    """

    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    ALL_TO_ALL = "all_to_all"
    EXCHANGE = "exchange"
    SEND = "send"
    RECEIVE = "receive"


class Track(NamedTuple):
    """Where operators wait for each other: what is issued on one track runs in that order.

    A lane is one track. Transfers between two stages have a track for each edge, because a
    receive that is posted early must not hold up a send.

    Attributes:
        lane: what it occupies.
        edge: of the transfers, empty for all other operators.
    """

    lane: Lane
    edge: str = ""


class Strand(StrEnum):
    """Which of the two micro-batches of a visit an operator belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class Operator:
    """One GEMM, one norm, one attention, one collective.

    Attributes:
        name: unique in its graph, dotted: `fc1.dgrad`.
        lane: what it occupies.
        reads: slots it needs, in the order of `run`'s arguments.
        writes: slots it makes, in the order of `run`'s results.
        run: launches it. Takes the values of `reads`, returns the value of `writes`: nothing,
            one value, or a tuple. A communication operator returns a `Pending` around them.
        cost: nominal seconds per token of the micro-batch. Only the ratio between operators
            matters: built-in plans use it where no profile exists.
        accumulates: the parameters whose gradient it adds to.
        edge: of a transfer between two stages.
        collective: what it does on a communication lane; None elsewhere.
        shrinks: whether it can leave processors to communication: a GEMM of cuBLAS.
        rule: how slots lie that it reads and writes; None where all that it reads lies alike.
        rehearsals: what is run in its place when a stage rehearses, where nothing is sent or
            received and nothing may be left behind; of several each in a rehearsal of its own.
        waits: whether the host waits until what it reads is there, before it issues what follows:
            `run` then takes values that the host can look at.
        light: whether it only moves bytes, so that making its results again costs little.
        remakes: operators that make some of its results again from others of them, where that takes
            less than the whole.
        growth: nominal seconds per token for each token of the sequence, where the cost grows with
            its length, as attention's does: `cost` is then that of some length (see `at`).
        varies: whether its time depends on what values say, such as how many tokens have chosen an
            expert, and not on the size of a micro-batch alone.
        takes: of what it writes in place, the slot that it writes and the one that it reads, whose
            memory that takes over. Nothing else reads that one afterwards.
        fp8: the format of 8 bits that it multiplies in or casts to; empty for none.
        records: of what it writes, the slots that hold a graph of autograd, and with it memory of
            what it reads and writes besides: as long as one is saved, none of them can be moved.
        ahead: of a copy to or from the host, operators that compute may be given after it before
            it waits for it, and the copy's lane for compute. Or else what copies to the host have
            read would be held until backward, and what others have brought until the next
            forward, since nothing else waits for them.
        track: where it is issued.
    """

    name: str
    lane: Lane
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    run: Callable[..., Any] = field(repr=False, compare=False)
    cost: float = field(default=0.0, compare=False)
    accumulates: tuple[Any, ...] = field(default=(), repr=False, compare=False)
    edge: str = ""
    collective: Collective | None = field(default=None, compare=False)
    shrinks: bool = field(default=False, compare=False)
    rule: Rule | None = field(default=None, repr=False, compare=False)
    rehearsals: tuple[Callable[..., Any], ...] = field(default=(), repr=False, compare=False)
    growth: float = field(default=0.0, compare=False)
    waits: bool = field(default=False, compare=False)
    varies: bool = field(default=False, compare=False)
    light: bool = field(default=False, compare=False)
    remakes: tuple[Operator, ...] = field(default=(), repr=False, compare=False)
    takes: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    records: tuple[str, ...] = field(default=(), compare=False)
    fp8: str = field(default="", compare=False)
    ahead: int = field(default=0, compare=False)
    track: Track = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Looked up with every launch.
        object.__setattr__(self, "track", Track(self.lane, self.edge))

    def at(self, length: int) -> Operator:
        """The same operator with its cost at sequences of `length` tokens."""
        return replace(self, cost=self.growth * length) if self.growth else self

    @property
    def computes(self) -> bool:
        """Whether it occupies the lane `compute`."""
        return self.lane is Lane.COMPUTE

    @property
    def moves(self) -> bool:
        """Whether it moves bytes beside compute, which a plan can so hide."""
        return self.lane.moves

    @property
    def is_communication(self) -> bool:
        """Whether it occupies a lane on which ranks communicate."""
        return self.lane.moves and not self.lane.copies

    def __str__(self) -> str:
        return self.name
