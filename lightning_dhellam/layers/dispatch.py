"""How tokens reach the experts that they have chosen, and how results come back.

Each token [H] becomes a row for each of its k experts. Rows are ordered by expert, and those for
experts of other ranks travel there:

    forward   order  permute (counts  wait  dispatch  sort) ... (unsort  combine)  unpermute
    backward  unpermute.grad (combine.grad  unsort.grad) ... (sort.grad  dispatch.grad) permute.grad

What is in parentheses is left out where each rank has all experts. How many rows go where is known
on the device at first; the exchange needs it on the host, which waits for it in a row of the plan
of its own (`counts.wait`), so that other work keeps the device busy meanwhile.

Shapes: S tokens of a sequence that this rank brings, B batch, k experts of a token, M = S·B·k rows
that it sends, R rows that arrive, P ranks, E experts, L = E / P of them on this rank. Nothing is
kept between operators but slots, since two micro-batches are under way at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers import practice
from lightning_dhellam.layers.rows import Rows, places_of, rows_of, to_host
from lightning_dhellam.layers.rules import gathers
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import Held, Move, Rule

_INDEX = 4
"""Bytes of a row's number."""
_WEIGHT = 4
"""Bytes of a routing weight."""


class Ordered(NamedTuple):
    """Slots of the rows that this rank's experts compute, ordered by expert.

    Attributes:
        hidden: [R, H].
        weights: routing weights [R], fp32.
        ends: where the rows of each expert end, [L] int32 on the device.
        rows: `Rows`, or None where only the device knows.
    """

    hidden: str
    weights: str
    ends: str
    rows: str | None


@dataclass(frozen=True)
class Dispatch:
    """The way of rows to experts and back.

    Attributes:
        experts: E.
        chosen: k.
        hidden: H.
        shared: whether tensor-parallel ranks share each expert: then each brings all tokens, and
            results are partial sums.
        kernels: what computes the operators.
        ranks: P.
        rank: this one of them.
    """

    experts: int
    chosen: int
    hidden: int
    shared: bool
    kernels: Kernels
    ranks: int
    rank: int

    def forward(self, w: GraphWriter, read: str, probs: str, chosen: str) -> Ordered:
        """Add the way to the experts, up to the wait for the host.

        Args:
            w: of forward.
            read: slot of hidden states [S, B, H] of all tokens that this rank brings.
            probs: slot of the routing weights [S·B, k].
            chosen: slot of the experts [S·B, k]; E where a choice was dropped.
        """
        self._order(w, read, probs, chosen)
        if self.ranks > 1:
            self._count(w)
        self._permute(w, read)
        return self.ordered

    @property
    def ordered(self) -> Ordered:
        """The slots that the experts read, once `exchange` was added."""
        if self.ranks == 1:
            return Ordered("sent", "sent_weights", "ends", None)
        return Ordered("sorted", "sorted_weights", "ends", "rows")

    def exchange(self, w: GraphWriter) -> None:
        """Add what `forward` leaves for later: the wait, and the exchange itself."""
        if self.ranks == 1:
            return
        w.host(
            "counts.wait",
            ("host_counts",),
            {"rows": 0.0},
            partial(rows_of, rank=self.rank),
            waits=True,
            rule=Rule({"ep": Move(Held.REPLICATED, Held.EXPERTS)}),
        )
        reads, writes = ("sent", "sent_weights"), ("arrived", "arrived_weights")
        self._exchange(w, "dispatch", reads, writes, there=True)
        self._place(w)
        permute = self.kernels.permute.permute
        size = self._size(w) + self._weight(w)
        w.compute(
            "experts.sort",
            ("arrived", "arrived_weights", "origins"),
            {"sorted": self._size(w), "sorted_weights": self._weight(w)},
            lambda hidden, weights, origins: (permute(hidden, origins), weights[origins]),
            moved=2 * size,
            varies=True,
        )

    def combine(self, w: GraphWriter, found: str, write: str) -> None:
        """Add the way back of what experts have found [R, H], to `write` [S, B, H]."""
        if self.ranks > 1:
            self._reorder(w, "experts.unsort", found, "spots", "leaving")
            self._exchange(w, "combine", ("leaving",), ("returned",), there=False)
            found = "returned"
        size = w.sizes.wide(self.hidden) * self._tokens(w)
        w.compute(
            "experts.unpermute",
            (found, "place"),
            {write: size},
            self._unpermute,
            moved=size + self._size(w),
            rule=self._of_sums((self._summed, Held.REPLICATED)),
        )

    def combine_grad(self, w: GraphWriter, grad: str, write: str) -> None:
        """Add the way of the gradient [S, B, H] to the experts, to `write` [R, H]."""
        permute = self.kernels.permute.permute
        several = self.ranks > 1
        w.compute(
            "experts.unpermute.grad",
            (grad, "order", "place"),
            {"d_returned" if several else write: self._size(w)},
            lambda dy, order, place: permute(dy.flatten(0, -2), order, place.flatten(0, -2)),
            moved=w.sizes.wide(self.hidden) * self._tokens(w) + self._size(w),
        )
        if several:
            self._exchange(w, "combine.grad", ("d_returned",), ("d_leaving",), there=True)
            self._reorder(w, "experts.unsort.grad", "d_leaving", "origins", write)

    def backward(self, w: GraphWriter, grad: str, weights: str, write: str, probs: str) -> None:
        """Add the way back of gradients.

        Args:
            w: of backward.
            grad: slot of the gradient by `Ordered.hidden` [R, H].
            weights: slot of that by `Ordered.weights` [R].
            write: slot of the gradient by hidden states [S, B, H].
            probs: slot of that by routing weights [S·B, k].
        """
        if self.ranks > 1:
            permute = self.kernels.permute.permute
            w.compute(
                "experts.sort.grad",
                (grad, weights, "spots"),
                {"d_arrived": self._size(w), "d_arrived_weights": self._weight(w)},
                lambda hidden, weights, spots: (permute(hidden, spots), weights[spots]),
                moved=2 * self._size(w),
                varies=True,
                rule=self._of_sums((self._summed, self._summed, Held.REPLICATED)),
            )
            reads, writes = ("d_arrived", "d_arrived_weights"), ("d_sent", "d_sent_weights")
            self._exchange(w, "dispatch.grad", reads, writes, there=False)
            grad, weights = writes

        def run(rows: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
            by_choice = weights[place.clamp_min(0)].masked_fill_(place < 0, 0.0)
            return self._unpermute(rows, place), by_choice.flatten(0, -2)

        size = w.sizes.wide(self.hidden) * self._tokens(w)
        w.compute(
            "experts.permute.grad",
            (grad, weights, "place"),
            {write: size, probs: self._weight(w)},
            run,
            moved=size + self._size(w),
            rule=self._of_sums((self._summed, self._summed, Held.REPLICATED)),
        )

    def _order(self, w: GraphWriter, read: str, probs: str, chosen: str) -> None:
        index = _INDEX * self.rows(w)
        w.compute(
            "experts.order",
            (chosen, probs, read),
            {
                "order": index,
                "place": index,
                "sent_weights": self._weight(w),
                "ends" if self.ranks == 1 else "counts": 0.0,
            },
            self._sort,
            moved=16 * index,
            rehearsals=tuple(partial(self._practise, number) for number in range(practice.COUNT)),
        )

    def _practise(
        self, number: int, chosen: Tensor, probs: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `_sort` gives by a routing that is made up."""
        return self._sort(practice.made_up(chosen, self.experts, number), probs, x)

    def _sort(
        self, chosen: Tensor, probs: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Order rows by expert, those of one expert by token.

        Returns the token of each row [M], the row of each choice [S, B, k], the weight of each row
        [M], and either where the rows of each expert end [E], or how many there are [1, E].
        """
        order, place, ends = self.kernels.permute.sort(chosen, self.experts)
        # A choice that was dropped has no row: its weight goes behind them all.
        behind = torch.where(place < 0, len(order), place).flatten().long()
        weights = probs.new_zeros(len(order) + 1, dtype=torch.float32)
        weights.scatter_(0, behind, probs.flatten().float())
        last = ends if self.ranks == 1 else ends.diff(prepend=ends.new_zeros(1))[None]
        return order, place.view(-1, x.shape[1], self.chosen), weights[:-1], last

    def _unpermute(self, rows: Tensor, place: Tensor) -> Tensor:
        """The sum of the rows of each token [S, B, H]."""
        unpermute = self.kernels.permute.unpermute
        return unpermute(rows, place.flatten(0, -2), None, rows.dtype).view(*place.shape[:-1], -1)

    def _count(self, w: GraphWriter) -> None:
        """Tell all ranks, and then the host, how many rows there are for each expert."""
        w.collective(
            Lane.EP,
            "counts.gather",
            ("counts",),
            {"all_counts": 0.0},
            collectives.all_gather,
            Collective.ALL_GATHER,
            gathers(Lane.EP, Held.SAMPLES),
            crossing=0.0,
        )
        w.host("counts.copy", ("all_counts",), {"host_counts": 0.0}, to_host)

    def _permute(self, w: GraphWriter, read: str) -> None:
        permute = self.kernels.permute.permute
        w.compute(
            "experts.permute",
            (read, "order", "place"),
            {"sent": self._size(w)},
            lambda x, order, place: permute(x.flatten(0, -2), order, place.flatten(0, -2)),
            moved=w.sizes.wide(self.hidden) * self._tokens(w) + self._size(w),
        )

    def _place(self, w: GraphWriter) -> None:
        index = _INDEX * self.rows(w)
        w.compute(
            "experts.place",
            ("all_counts", "rows"),
            {"origins": index, "spots": index, "ends": 0.0},
            partial(places_of, rank=self.rank),
            moved=4 * index,
            varies=True,
            rule=Rule({"ep": Move((Held.REPLICATED, Held.EXPERTS), Held.EXPERTS)}),
        )

    def _reorder(self, w: GraphWriter, name: str, read: str, by: str, write: str) -> None:
        permute = self.kernels.permute.permute
        summed = self._summed if name == "experts.unsort" else Held.REPLICATED
        rule = self._of_sums((summed, Held.REPLICATED), summed)
        size = self._size(w)
        writes = {write: size}
        w.compute(name, (read, by), writes, permute, moved=2 * size, varies=True, rule=rule)

    def _exchange(
        self,
        w: GraphWriter,
        name: str,
        reads: tuple[str, ...],
        writes: tuple[str, ...],
        *,
        there: bool,
    ) -> None:
        """Add an exchange, to the experts or from there. The second slot is one of weights."""

        def launch(communicator: Communicator, *values: Any) -> Pending:
            *tensors, rows = values
            assert isinstance(rows, Rows)
            given, taken = (rows.given, rows.taken) if there else (rows.taken, rows.given)
            # Rows of choices that were dropped come last, and stay.
            tensors = [x[: sum(given)] for x in tensors]
            return collectives.all_to_all(communicator, *tensors, given=given, taken=taken)

        sizes = (self._size(w), self._weight(w))[: len(writes)]
        away, here = (Held.SAMPLES, Held.EXPERTS) if there else (Held.EXPERTS, Held.SAMPLES)
        moves = {"ep": Move((*[away] * len(reads), Held.EXPERTS), here)}
        # What comes back is a partial sum where tensor-parallel ranks share experts.
        if self.shared and not there:
            moves["tp"] = Move((*[Held.PARTIAL] * len(reads), Held.REPLICATED), Held.PARTIAL)
        w.collective(
            Lane.EP,
            f"experts.{name}",
            (*reads, "rows"),
            dict(zip(writes, sizes, strict=True)),
            launch,
            Collective.ALL_TO_ALL,
            Rule(moves),
            crossing=sum(sizes) * (1 - 1 / self.ranks),
            varies=True,
        )

    @property
    def _summed(self) -> Held:
        """How results lie on tensor parallelism where it shares experts."""
        return Held.PARTIAL if self.shared else Held.REPLICATED

    def _of_sums(self, reads: tuple[Held, ...], writes: Held | None = None) -> Rule:
        """The rule of an operator that moves what may be partial sums about."""
        if not self.shared:
            return Rule()
        return Rule({"tp": Move(reads, self._summed if writes is None else writes)})

    def _tokens(self, w: GraphWriter) -> float:
        """Tokens that this rank brings, of each of the micro-batch."""
        return 1.0 if self.shared else 1 / w.sizes.tp

    def rows(self, w: GraphWriter) -> float:
        """Rows that this rank's experts compute for each token of the micro-batch, if even."""
        return self.chosen * self._tokens(w)

    def _size(self, w: GraphWriter) -> float:
        return w.sizes.wide(self.hidden) * self.rows(w)

    def _weight(self, w: GraphWriter) -> float:
        return _WEIGHT * self.rows(w)
