"""How keys come to the ranks that share a sequence, and how their gradients go home.

In hop k rank r has the keys of rank r - k. A ring hands them on from rank to rank, one hop ahead of
the attention to them; gradients follow one hop behind, and each rank adds its own. A gather brings
the keys of all ranks at once, and a scatter sums their gradients: less to start, more to hold.

Shapes: C ranks, S tokens of a rank, T of a hop's keys, B batch, G heads, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_dhellam.layers.rules import gathers, scatters
from lightning_dhellam.layers.travelling import Travelling
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.parallel import collectives, zigzag
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import Held, Move, Rule

_STAYS = Rule({Lane.CP: Move(Held.SEQUENCE, Held.SEQUENCE)})


@dataclass(frozen=True)
class Way(ABC):
    """What is common to both ways.

    Attributes:
        rank: which of those that share a sequence this one is.
        ranks: C, how many there are.
        dtype: in which gradients by keys travel.
        travelling: how keys travel.
    """

    rank: int
    ranks: int
    dtype: torch.dtype
    travelling: Travelling

    @property
    @abstractmethod
    def held(self) -> Held:
        """How the keys that have come lie on the ranks."""

    @property
    @abstractmethod
    def collected_held(self) -> Held:
        """How gradients by them lie."""

    @abstractmethod
    def slot(self, hop: int, name: str) -> str:
        """The slot that has a hop's keys, of which this rank's own are in `name`_0."""

    @abstractmethod
    def bring(self, w: GraphWriter, hop: int, name: str, size: float) -> None:
        """Add what brings the keys of `hop`, if there is such a hop, of `size` bytes per token."""

    @abstractmethod
    def keys(self, brought: Tensor, hop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [T, B, G, D] of a hop, from what its slot holds."""

    @abstractmethod
    def collected(self, hop: int) -> tuple[str, ...]:
        """Slots with gradients of the hops before, that the one of `hop` joins."""

    @abstractmethod
    def written(self, hop: int) -> tuple[str, float]:
        """The slot with the gradients of `hop`, and its tokens for each of this rank's."""

    @abstractmethod
    def collect(self, dk: Tensor, dv: Tensor, hop: int, length: int, *collected: Tensor) -> Tensor:
        """The value of that slot, from a hop's gradients [T, B, G, D]; S is `length`."""

    @abstractmethod
    def send(self, w: GraphWriter, hop: int, size: float) -> None:
        """Add what the gradients of `hop` do next; after the last, `d_keys_home` has them all."""

    def is_late(self, hop: int) -> bool:
        """Whether the keys of `hop` are between this rank's two pieces; see `zigzag.is_late`."""
        return zigzag.is_late(self.rank, hop)

    def _source(self, hop: int) -> int:
        return zigzag.source_of(self.rank, self.ranks, hop)

    def _kept(self, length: int, hop: int) -> int:
        """How many of a rank's tokens are keys in `hop`."""
        return length if self.is_late(hop) else length // 2

    def _factor(self, w: GraphWriter) -> float:
        """Bytes of gradients as they travel in those of activations."""
        return self.dtype.itemsize / w.sizes.dtype.itemsize


class Ring(Way):
    """Keys go from rank to rank."""

    @property
    def held(self) -> Held:
        return Held.SEQUENCE

    @property
    def collected_held(self) -> Held:
        return Held.SEQUENCE

    def slot(self, hop: int, name: str) -> str:
        return f"{name}_{hop}"

    def bring(self, w: GraphWriter, hop: int, name: str, size: float) -> None:
        if hop < self.ranks:
            self._hand_on(w, f"{name}.exchange.{hop}", f"{name}_{hop - 1}", f"{name}_{hop}", size)

    def keys(self, brought: Tensor, hop: int) -> tuple[Tensor, Tensor]:
        return self.travelling.unpack(brought[:, : self._kept(brought.shape[1], hop)])

    def collected(self, hop: int) -> tuple[str, ...]:
        return ()

    def written(self, hop: int) -> tuple[str, float]:
        # The first has nothing to wait for: it makes what goes on the way.
        return "d_keys_1" if hop == 1 else f"d_keys_of_{hop}", 1.0

    def collect(self, dk: Tensor, dv: Tensor, hop: int, length: int, *collected: Tensor) -> Tensor:
        pair = torch.stack([dk, dv]).to(self.dtype)
        if hop > 1 or len(dk) == length:
            return pair
        whole = pair.new_zeros(2, length, *pair.shape[2:])
        whole[:, : len(dk)] = pair
        return whole

    def send(self, w: GraphWriter, hop: int, size: float) -> None:
        size *= self._factor(w)
        if hop > 1:

            def add(arrived: Tensor, own: Tensor) -> Tensor:
                # In place: nothing else reads what has arrived.
                arrived[:, : own.shape[1]] += own
                return arrived

            slots = (f"d_keys_arrived_{hop}", f"d_keys_of_{hop}")
            w.compute(
                f"keys.grad.add.{hop}",
                slots,
                {f"d_keys_{hop}": size},
                add,
                moved=3 * size,
                takes=((f"d_keys_{hop}", f"d_keys_arrived_{hop}"),),
                rule=_STAYS,
            )
        last = hop == self.ranks - 1
        write = "d_keys_home" if last else f"d_keys_arrived_{hop + 1}"
        self._hand_on(w, f"keys.grad.exchange.{hop}", f"d_keys_{hop}", write, size)

    def _hand_on(self, w: GraphWriter, name: str, read: str, write: str, size: float) -> None:
        launch = partial(
            collectives.exchange,
            target=(self.rank + 1) % self.ranks,
            source=(self.rank - 1) % self.ranks,
        )
        w.collective(
            Lane.CP,
            name,
            (read,),
            {write: size},
            launch,
            Collective.EXCHANGE,
            _STAYS,
            crossing=size,
        )


class Gathered(Way):
    """All keys come at once."""

    @property
    def held(self) -> Held:
        return Held.REPLICATED

    @property
    def collected_held(self) -> Held:
        return Held.PARTIAL

    def slot(self, hop: int, name: str) -> str:
        return f"{name}_all"

    def bring(self, w: GraphWriter, hop: int, name: str, size: float) -> None:
        if hop == 1:
            w.collective(
                Lane.CP,
                f"{name}.gather",
                (f"{name}_0",),
                {f"{name}_all": size * self.ranks},
                collectives.all_gather,
                Collective.ALL_GATHER,
                gathers(Lane.CP, Held.SEQUENCE),
                crossing=size * (self.ranks - 1),
            )

    def keys(self, brought: Tensor, hop: int) -> tuple[Tensor, Tensor]:
        first = 2 * self._source(hop)
        pair = brought[first : first + 2, : self._kept(brought.shape[1], hop)]
        return self.travelling.unpack(pair)

    def collected(self, hop: int) -> tuple[str, ...]:
        return (f"d_keys_to_{hop - 1}",) if hop > 1 else ()

    def written(self, hop: int) -> tuple[str, float]:
        return f"d_keys_to_{hop}", float(self.ranks)

    def collect(self, dk: Tensor, dv: Tensor, hop: int, length: int, *collected: Tensor) -> Tensor:
        if collected:
            (whole,) = collected
        else:
            whole = dk.new_zeros(2 * self.ranks, length, *dk.shape[1:], dtype=self.dtype)
        first = 2 * self._source(hop)
        whole[first, : len(dk)], whole[first + 1, : len(dk)] = dk, dv
        return whole

    def send(self, w: GraphWriter, hop: int, size: float) -> None:
        if hop == self.ranks - 1:
            size *= self._factor(w)
            w.collective(
                Lane.CP,
                "keys.grad.scatter",
                (f"d_keys_to_{hop}",),
                {"d_keys_home": size},
                collectives.reduce_scatter,
                Collective.REDUCE_SCATTER,
                scatters(Lane.CP, Held.SEQUENCE),
                crossing=size * (self.ranks - 1),
            )


WAYS: dict[str, type[Way]] = {"ring": Ring, "all_gather": Gathered}
"""Ways by the names that users know."""
AUTO = "auto"
"""Leaves the way to a search."""


def check_exchange(name: str) -> None:
    """Refuse the name of a way that there is not. With `auto` a search may choose.

    Raises:
        ValueError: with the names that there are.
    """
    if name not in (*WAYS, AUTO):
        known = " or ".join((*WAYS, AUTO))
        raise ValueError(f"context_exchange={name!r} is not known: use {known}")


def exchanges(name: str, ranks: int) -> tuple[str, ...]:
    """The ways that `name` leaves open where so many ranks share a sequence, the first for now."""
    if name != AUTO:
        return (name,)
    return tuple(WAYS) if ranks > 1 else tuple(WAYS)[:1]
